"""A stress from energies alone."""

from collections.abc import Callable

import numpy as np
from ase import Atoms
from structures import strained


def numerical_stress(energy_of: Callable[[Atoms], float], atoms: Atoms, step: float = 5e-3) -> np.ndarray:
    """(3, 3), eV/Å³: (1/V) dE/d(eps), r -> r (1 + eps), by differences of energies in eV."""
    stress = np.zeros((3, 3))
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        energies = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[a, b] += sign * step / 2
            strain[b, a] += sign * step / 2
            energies.append(energy_of(strained(atoms, strain)))
        stress[a, b] = stress[b, a] = (energies[0] - energies[1]) / (2 * step * atoms.get_volume())
    return stress
