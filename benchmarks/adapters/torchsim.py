"""TorchSim up to 0.4: the list of one system, against Vesin's."""

from importlib.metadata import version

PACKAGES = ("torch-sim-atomistic", "vesin-torch")


def calls(atoms):
    if tuple(map(int, version("torch-sim-atomistic").split(".")[:2])) >= (0, 5):
        return {}  # torchsim_batched.py has the lists since then
    import torch
    from torch_sim import neighbors

    from diffnl.adapters.torchsim import unbatched_nl

    positions, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    one = dict(positions=positions, cell=cell, pbc=True, cutoff=torch.tensor(5.0))
    return {
        "TorchSim unbatched_nl, vesin_nl_ts": (
            lambda: unbatched_nl(**one),
            lambda: neighbors.vesin_nl_ts(**one),
        )
    }
