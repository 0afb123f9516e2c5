"""hip_torch_nl, the extension that diffnl takes the place of: its names and its signature.

from diffnl.adapters.hip_torch_nl import HIP_TORCH_NL_AVAILABLE, hip_torch_nl
"""

import torch
from torch import Tensor

import diffnl

from . import _common

HIP_TORCH_NL_AVAILABLE: bool = "hip" in diffnl.build_info()["backends"]
"""Whether this build has the kernels for AMD GPUs. CUDA and CPU tensors need none of them."""


@torch.no_grad()
def hip_torch_nl(
    positions: Tensor, cell: Tensor, pbc: Tensor | bool, cutoff: Tensor | float, sort_id: bool = False
) -> tuple[Tensor, Tensor]:
    """The full list of one system, on the device of `positions`: AMD, NVIDIA or CPU.

    Args:
        positions: (N, 3) float32 or float64, any length unit.
        cell: (3, 3), same dtype, rows are lattice vectors.
        pbc: (3,) bool, or one flag for all axes.
        cutoff: > 0, in the length unit of the positions; a number or a tensor of one.
        sort_id: sort by the first index. It ascends in any case; so then do the second and the shifts.

    Returns:
        mapping: (2, P) int64, centre and neighbour of each pair.
        shifts: (P, 3), dtype of `cell`, whole numbers: the neighbour lies at positions[j] + shifts @ cell.
            Without gradients; `diffnl.pair_vectors` of the two, `shifts.int()`, is differentiable.

    Raises:
        ValueError, TypeError: as `diffnl.neighbor_pairs`.
    """
    cutoff, sort_id = _common.length("cutoff", cutoff), _common.flag("sort_id", sort_id)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, sorted=sort_id)
    return pairs.mapping, pairs.shifts.to(cell.dtype)
