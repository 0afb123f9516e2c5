"""SchNetPack's lists as transforms, in float64 as its ASE interface has them, all neighbours within 6 Å."""

PACKAGES = ("schnetpack",)


def calls(atoms):
    import typing

    import torch.utils.data.dataloader

    # SchNetPack 2.1.1 imports a private name that torch 2.13 no longer has.
    if not hasattr(torch.utils.data.dataloader, "T_co"):
        torch.utils.data.dataloader.T_co = typing.TypeVar("T_co", covariant=True)
    from schnetpack import properties
    from schnetpack.transform import ASENeighborList, MatScipyNeighborList, TorchNeighborList

    from diffnl.adapters.schnetpack import DiffnlNeighborList

    def inputs_of(atoms):
        return {
            properties.Z: torch.tensor(atoms.numbers),
            properties.R: torch.tensor(atoms.positions),
            properties.cell: torch.tensor(atoms.cell.array)[None],
            properties.pbc: torch.tensor(atoms.pbc),
        }

    # The torch list holds N x N x images distances at once, hence only some of the atoms.
    whole, part = inputs_of(atoms), inputs_of(atoms[: min(len(atoms), 300)])
    ours = DiffnlNeighborList(6.0)
    others = {
        "MatScipyNeighborList": (MatScipyNeighborList(6.0), whole),
        "ASENeighborList": (ASENeighborList(6.0), whole),
        "TorchNeighborList (300 atoms)": (TorchNeighborList(6.0), part),
    }
    return {
        f"SchNetPack, {name}": (lambda i=inputs: ours(dict(i)), lambda t=theirs, i=inputs: t(dict(i)))
        for name, (theirs, inputs) in others.items()
    }
