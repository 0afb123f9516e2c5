"""Lists for metatomic's `NeighborListOptions` against those of vesin, with gradients, a new search a call."""

import torch

PACKAGES = ("metatomic-torch", "vesin")


def calls(atoms):
    import vesin.metatomic
    from metatomic.torch import NeighborListOptions, systems_to_torch

    from diffnl.adapters.metatomic import compute_neighbors

    system = systems_to_torch(atoms, dtype=torch.float64, positions_requires_grad=True)

    def pair(full):
        options = NeighborListOptions(cutoff=5.0, full_list=full, strict=True)
        theirs = vesin.metatomic.NeighborList(options, "angstrom", skin=0.0)
        return lambda: compute_neighbors(system, options), lambda: theirs.compute(system)

    return {"metatomic, full list, 5 Å": pair(True), "metatomic, half list, 5 Å": pair(False)}
