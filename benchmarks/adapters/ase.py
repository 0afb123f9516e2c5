"""ASE's neighbour list in full, for one cutoff and for radii."""

import ase.neighborlist
import numpy as np

from diffnl.adapters.ase import neighbor_list

PACKAGES = ("ase",)


def calls(atoms):
    def both(cutoff):
        return tuple(
            lambda function=function: function("ijdDS", atoms, cutoff)
            for function in (neighbor_list, ase.neighborlist.neighbor_list)
        )

    return {
        "ASE neighbor_list, 5 Å": both(5.0),
        "ASE neighbor_list, radii": both(np.linspace(1.5, 2.5, len(atoms))),
    }
