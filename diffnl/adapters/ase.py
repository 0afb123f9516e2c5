"""ASE: its neighbour lists with our search, and a calculator for any potential made with the layer."""

import math

import numpy as np
import torch

from ..neighbors import neighbor_pairs
from ..stress import forces_and_stress, to_voigt


def neighbor_list(quantities, a, cutoff, self_interaction=False, max_nbins=1e6):
    """`ase.neighborlist.neighbor_list` of the `ase.Atoms` a; see `primitive_neighbor_list`."""
    cell = a.get_cell(complete=True)
    return primitive_neighbor_list(quantities, a.pbc, cell, a.positions, cutoff, a.numbers, self_interaction)


def primitive_neighbor_list(
    quantities, pbc, cell, positions, cutoff,
    numbers=None, self_interaction=False, use_scaled_positions=False, max_nbins=1e6,
):  # fmt: skip
    """`ase.neighborlist.primitive_neighbor_list`: the same pairs in the same arrays, by ascending i.

    Args:
        quantities: any of i, j (P,) int64, d (P,), D (P, 3) float64, S (P, 3) int64. A single one: no tuple.
        pbc, cell, positions: three flags, (3, 3), (N, 3); fractional with `use_scaled_positions`.
        cutoff: a number; a dict by pairs of symbols or atomic numbers, 0 for pairs not in it; or radii (N,),
            whose sum is the cutoff of a pair. One search at the largest, then the choice of d < cutoff.
        numbers: (N,) atomic numbers, which a dict needs.
        self_interaction: list each atom with itself too, first in its row. max_nbins: without effect.

    Raises:
        ValueError: unknown quantities; what `neighbor_pairs` raises, even where ASE goes on: values that are
            not finite, a singular cell on periodic axes. TypeError: a dict without numbers.
    """
    if unknown := sorted(set(quantities) - set("ijdDS")):
        raise ValueError(f"`quantities` must be of 'i', 'j', 'd', 'D' and 'S'; got {unknown}")
    positions = torch.tensor(np.asarray(positions, dtype=float).reshape(len(positions), 3))
    cell = torch.tensor(np.asarray(cell, dtype=float))
    positions = positions @ cell if use_scaled_positions else positions
    longest, cutoff_of = _cutoffs(cutoff, numbers)
    # The next number up: ASE compares roots and the search squares; none may be lost to rounding.
    reach = math.nextafter(max(longest, 1e-3), math.inf)
    pairs = neighbor_pairs(positions, cell, [bool(flag) for flag in pbc], reach)
    arrays = *pairs.mapping, pairs.distances, pairs.vectors, pairs.shifts
    found = {name: array.numpy() for name, array in zip("ijdDS", arrays, strict=True)}
    if self_interaction:
        atoms = np.arange(len(positions))
        starts = np.searchsorted(found["i"], atoms)
        found = {x: np.insert(v, starts, atoms if x in "ij" else 0, axis=0) for x, v in found.items()}
    close = found["d"] < cutoff_of(found["i"], found["j"])
    found = found if close.all() else {name: found[name][close] for name in set(quantities)}
    chosen = tuple(found[name].astype(int) if name == "S" else found[name] for name in quantities)
    return chosen[0] if len(chosen) == 1 else chosen


def _cutoffs(cutoff, numbers):
    """The largest cutoff, and a function from the atoms i and j of pairs to theirs."""
    if isinstance(cutoff, dict):
        if numbers is None:
            raise TypeError("`numbers` must be given with a dict of cutoffs; got None")
        from ase.data import atomic_numbers

        species, kinds = np.unique(numbers, return_inverse=True)
        table = np.zeros((len(species), len(species)))
        for pair, value in cutoff.items():
            first, second = (species == atomic_numbers.get(name, name) for name in pair)
            table[np.outer(first, second) | np.outer(second, first)] = value
        return max(cutoff.values()), lambda i, j: table[kinds[i], kinds[j]]
    if np.isscalar(cutoff):
        return cutoff, lambda i, j: cutoff
    radii = np.asarray(cutoff)
    return 2 * np.max(radii, initial=0.0), lambda i, j: radii[i] + radii[j]


class _Potential:
    """ASE calculator of energy_fn(positions, cell, pbc, *per_atom) -> energy (), eV: a function or a module.

    It gets positions (N, 3), cell (3, 3) (None if all zero), pbc (3,) bool, and the `atoms.arrays` named in
    `per_atom`, ("numbers",) say, in `dtype` on `device`. Stress, in ASE's sign and order, needs a cell with
    a volume. Results stand until the atoms change; when the potential itself has changed, call `reset()`.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, energy_fn, per_atom=(), *, dtype=torch.float64, device="cpu", **kwargs):
        super().__init__(**kwargs)
        self.energy_fn, self.per_atom = energy_fn, tuple(per_atom)
        self.dtype, self.device = dtype, torch.device(device)

    def check_state(self, atoms, tol=1e-15):
        changes, known = super().check_state(atoms, tol), getattr(self.atoms, "arrays", {})
        # ASE compares its own arrays only.
        return changes + [x for x in self.per_atom if not np.array_equal(known.get(x), atoms.arrays.get(x))]

    def _tensor(self, array):
        return torch.tensor(array, device=self.device, dtype=self.dtype if array.dtype.kind == "f" else None)

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        positions = self._tensor(self.atoms.positions).requires_grad_()
        cell = self._tensor(self.atoms.cell.array).requires_grad_() if self.atoms.cell.any() else None
        per_atom = (self._tensor(self.atoms.arrays[name]) for name in self.per_atom)
        with torch.enable_grad():
            energy = self.energy_fn(positions, cell, self._tensor(self.atoms.pbc), *per_atom)
        forces, stress = forces_and_stress(energy, positions, cell)
        self.results = {"energy": energy.item(), "free_energy": energy.item()}
        self.results["forces"] = forces.double().numpy(force=True)
        if self.atoms.cell.rank == 3:
            self.results["stress"] = to_voigt(stress).double().numpy(force=True)


def __getattr__(name):
    """The class is made at its first use, on ASE's, and kept, so that pickles find it."""
    if name != "DiffnlCalculator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ase.calculators.calculator import Calculator

    return globals().setdefault(name, type(name, (_Potential, Calculator), {"__module__": __name__}))
