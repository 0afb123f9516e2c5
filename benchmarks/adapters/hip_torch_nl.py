"""hip_torch_nl runs on AMD GPUs only; TorchSim takes vesin's list in its place on others, so that is the peer."""

import torch

PACKAGES = ("torch-sim-atomistic", "vesin-torch")


def calls(atoms):
    from torch_sim.neighbors.vesin import vesin_nl_ts

    from diffnl.adapters.hip_torch_nl import hip_torch_nl

    positions = torch.tensor(atoms.positions, dtype=torch.float32)
    cell = torch.tensor(atoms.cell.array, dtype=torch.float32)
    pbc, cutoff = torch.tensor(atoms.pbc), torch.tensor(6.0)
    system_idx = torch.zeros(len(atoms), dtype=torch.int64)
    return {
        "hip_torch_nl, 6 Å": (
            lambda: hip_torch_nl(positions, cell, pbc, cutoff),
            lambda: vesin_nl_ts(positions, cell, pbc, cutoff, system_idx),
        )
    }
