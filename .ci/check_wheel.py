"""What an installed wheel must do on a machine without a GPU, in an environment of its own."""

from pathlib import Path

import torch

import diffnl
from diffnl.adapters.hip_torch_nl import hip_torch_nl

assert (Path(diffnl.library_path()).parent / "cmake" / "diffnlConfig.cmake").exists()
print("diffnl from", diffnl.__file__)
assert "site-packages" in diffnl.__file__
positions = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
cell = (3.0 * torch.eye(3, dtype=torch.float64)).requires_grad_()
pairs = diffnl.NeighborList(4.0)(positions, cell, True)
assert pairs.mapping.shape == (2, 6), pairs.mapping.shape
assert hip_torch_nl(positions.detach(), cell.detach(), True, 4.0)[0].shape == (2, 6)
_, stress = diffnl.forces_and_stress(pairs.distances.sum(), positions, cell)
torch.testing.assert_close(stress, torch.eye(3, dtype=torch.float64) * 6.0 / 27.0)
