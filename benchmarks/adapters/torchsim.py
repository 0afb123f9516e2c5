"""TorchSim: a list of one system, and of eight at once in the older list that takes a batch."""

PACKAGES = ("torch-sim-atomistic", "vesin-torch")


def calls(atoms):
    import torch
    from torch_sim import neighbors

    from diffnl.adapters.torchsim import torchsim_nl, unbatched_nl

    atoms.wrap()  # the list of a batch loses pairs of atoms outside the cell
    positions = torch.tensor(atoms.positions)
    cell = torch.tensor(atoms.cell.array)
    one = dict(positions=positions, cell=cell, pbc=True, cutoff=torch.tensor(5.0))

    systems = 8
    system_idx = torch.arange(systems).repeat_interleave(len(atoms))
    many = positions.repeat(systems, 1), cell.repeat(systems, 1), torch.ones(3 * systems, dtype=torch.bool)
    return {
        "TorchSim unbatched_nl, vesin_nl_ts": (
            lambda: unbatched_nl(**one),
            lambda: neighbors.vesin_nl_ts(**one),
        ),
        "TorchSim torchsim_nl, 8 systems, linked cell": (
            lambda: torchsim_nl(*many, 5.0, system_idx),
            lambda: neighbors.torch_nl_linked_cell(5.0, *many, system_idx),
        ),
    }
