"""pymatgen's search for the neighbours of all points."""

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres as theirs

from diffnl.adapters.pymatgen import find_points_in_spheres as ours

PACKAGES = ("pymatgen",)


def calls(atoms):
    coords = np.ascontiguousarray(atoms.positions)
    pbc, lattice = atoms.pbc.astype(np.int64), np.ascontiguousarray(atoms.cell.array)

    def call(function):
        return lambda: function(coords, coords, r=5.0, pbc=pbc, lattice=lattice)

    return {"pymatgen find_points_in_spheres, 5 Å": (call(ours), call(theirs))}
