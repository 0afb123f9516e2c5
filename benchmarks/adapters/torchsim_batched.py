"""TorchSim since 0.5: the list of a batch, one box or twenty small ones, against its default and Vesin's."""

from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch-sim-atomistic", "nvalchemi-toolkit-ops", "vesin-torch")


def calls(atoms):
    if tuple(map(int, version("torch-sim-atomistic").split(".")[:2])) < (0, 5):
        return {}  # torchsim.py has the lists of that time
    import runpy

    import torch

    tests = Path(__file__).resolve().parents[2] / "tests" / "adapters"
    runpy.run_path(str(tests / "type_parameters.py"))["install"]("torch_sim")
    from torch_sim import neighbors

    from diffnl.adapters.torchsim import torchsim_nl

    rows = {}
    for name, systems, size in ((f"{len(atoms)} atoms", 1, len(atoms)), ("20 x 50 atoms", 20, 50)):
        given = batch(torch, atoms, systems, size)
        for theirs in (neighbors.torchsim_nl, neighbors.vesin_nl_ts):
            listed = "default" if theirs is neighbors.torchsim_nl else theirs.__name__
            rows[f"TorchSim torchsim_nl, {name}, {listed}"] = (
                lambda given=given: torchsim_nl(**given),
                lambda given=given, theirs=theirs: theirs(**given),
            )
    return rows


def batch(torch, atoms, systems, size):
    """Systems of the first `size` atoms of the box, in cubes of the same density, each a little different."""
    edge = (atoms.get_volume() * size / len(atoms)) ** (1 / 3)
    cell = edge * torch.eye(3, dtype=torch.float64).repeat(systems, 1, 1)
    generator = torch.Generator().manual_seed(0)
    if systems == 1:
        positions = torch.tensor(atoms.positions)
    else:
        positions = edge * torch.rand(systems * size, 3, dtype=torch.float64, generator=generator)
    return {
        "positions": positions,
        "cell": cell,
        "pbc": torch.ones(systems, 3, dtype=torch.bool),
        "cutoff": 5.0,
        "system_idx": torch.arange(systems).repeat_interleave(size),
    }
