"""hip_torch_nl itself runs on AMD GPUs only: against what codes take in its place elsewhere, vesin's list."""

PACKAGES = ("vesin-torch",)


def calls(atoms):
    import torch
    from vesin.torch import NeighborList

    from diffnl.adapters.hip_torch_nl import hip_torch_nl

    positions = torch.tensor(atoms.positions, dtype=torch.float32)
    cell = torch.tensor(atoms.cell.array, dtype=torch.float32)
    pbc, cutoff = torch.tensor(atoms.pbc), torch.tensor(6.0)
    vesin, in_double = NeighborList(cutoff=6.0, full_list=True), (positions.double(), cell.double())
    return {
        "hip_torch_nl, 6 Å": (
            lambda: hip_torch_nl(positions, cell, pbc, cutoff),
            lambda: vesin.compute(*in_double, True, quantities="ijS"),
        )
    }
