"""Named structures, as `ase.Atoms`: crystals, strained and sheared ones, slabs, wires, molecules, tiny cells.

All atoms are a little off their sites, by a fixed seed: no pair lies on a cutoff, and forces are not zero.
"""

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, graphene, molecule


def rattled(atoms: Atoms, size: float = 0.05, seed: int = 0) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += size * np.random.default_rng(seed).standard_normal(atoms.positions.shape)
    return atoms


def strained(atoms: Atoms, strain: list) -> Atoms:
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + np.array(strain)), scale_atoms=True)
    return atoms


def _slab() -> Atoms:
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    add_adsorbate(slab, "O", 1.3, "fcc")
    return slab


def _scattered_over_cells(atoms: Atoms) -> Atoms:
    """The same crystal, each atom moved by whole cells: positions lie anywhere."""
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(1).integers(-2, 3, (len(atoms), 3)) @ atoms.cell.array
    return atoms


def _wire() -> Atoms:
    wire = Atoms("Au2", [[0, 0, 0], [0.3, 0.2, 1.4]], cell=[0, 0, 2.93], pbc=[False, False, True])
    return wire


SHEAR = [[0.02, 0.05, 0.0], [0.0, -0.03, 0.04], [0.06, 0.0, 0.01]]

CRYSTALS = {
    "silicon": rattled(bulk("Si")),
    "silicon_sheared": strained(rattled(bulk("Si", cubic=True)), SHEAR),
    "salt": rattled(bulk("NaCl", "rocksalt", a=5.64, cubic=True)),
    "magnesium": rattled(bulk("Mg")),
    "copper_one_atom": bulk("Cu"),
    "iron_left_handed": rattled(
        Atoms("Fe2", [[0, 0, 0], [1.4, 1.4, 1.4]], cell=2.87 * np.eye(3)[[1, 0, 2]], pbc=True)
    ),
    "oxide_anywhere": _scattered_over_cells(rattled(bulk("MgO", "rocksalt", a=4.21, cubic=True))),
    "gallium_nitride": rattled(bulk("GaN", "wurtzite", a=3.19, c=5.19)),
}

SLABS = {"slab_with_oxygen": rattled(_slab()), "graphene": rattled(graphene(vacuum=5.0))}

OPEN = {
    "wire": _wire(),
    "ethanol": rattled(molecule("CH3CH2OH")),
    "one_atom": Atoms("He", [[0.1, 0.2, 0.3]]),
}

STRUCTURES = CRYSTALS | SLABS | OPEN


def random_box(atoms: int = 40, seed: int = 3) -> Atoms:
    """Atoms at random in a triclinic cell, at 0.1 atoms/Å³."""
    rng = np.random.default_rng(seed)
    cell = np.array([[1.0, 0.0, 0.0], [0.3, 0.9, 0.0], [-0.2, 0.4, 1.1]])
    cell *= (10.0 * atoms / abs(np.linalg.det(cell))) ** (1 / 3)
    return Atoms(f"Si{atoms}", rng.random((atoms, 3)) @ cell, cell=cell, pbc=True)


def canonical(i, j, shifts, *more):
    """Pairs in ascending (i, j, S), as NumPy arrays; what else belongs to a pair goes along."""
    i, j, shifts = (np.asarray(x) for x in (i, j, shifts))
    shifts = np.rint(shifts).astype(int).reshape(-1, 3)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], j, i))
    return tuple(np.asarray(x)[order] for x in (i, j, shifts, *more))
