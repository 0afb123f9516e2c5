"""`neighbor_list` of nvalchemi-toolkit-ops, both forms; "cell_list" is faster here than its own choice."""

import torch

PACKAGES = ("nvalchemi-toolkit-ops",)


def calls(atoms):
    from nvalchemiops.torch.neighbors import neighbor_list as theirs

    from diffnl.adapters.nvalchemi import neighbor_list as ours

    positions, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    where = positions, 5.0, cell, torch.tensor(atoms.pbc)

    def pair(**options):
        return lambda: ours(*where, **options), lambda: theirs(*where, method="cell_list", **options)

    return {
        "nvalchemi-toolkit-ops, matrix, 5 Å": pair(),
        "nvalchemi-toolkit-ops, COO, 5 Å": pair(return_neighbor_list=True),
    }
