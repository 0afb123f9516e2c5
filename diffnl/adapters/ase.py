"""ASE: its neighbour lists with our search, and a calculator for any potential made with the layer."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from ..neighbors import neighbor_pairs
from ..stress import forces_and_stress, has_volume, to_voigt
from . import _common


def neighbor_list(quantities, a, cutoff, self_interaction=False, max_nbins=1e6):
    """`ase.neighborlist.neighbor_list` of the `ase.Atoms` a; see `primitive_neighbor_list`."""
    cell = a.cell.array
    return primitive_neighbor_list(quantities, a.pbc, cell, a.positions, cutoff, a.numbers, self_interaction)


def primitive_neighbor_list(
    quantities, pbc, cell, positions, cutoff,
    numbers=None, self_interaction=False, use_scaled_positions=False, max_nbins=1e6,
):  # fmt: skip
    """`ase.neighborlist.primitive_neighbor_list`: the same pairs in the same arrays, by ascending i.

    Args:
        quantities: any of i, j (P,) int64, d (P,), D (P, 3) float64, S (P, 3) int64. A single one: no tuple.
        pbc, cell, positions: three flags, (3, 3), (N, 3); fractional with `use_scaled_positions`.
        cutoff: a number > 0; a dict by pairs of symbols or atomic numbers, 0 for pairs not in it; or radii
            (N,) >= 0, whose sum is the cutoff of a pair. One search at the largest, then the choice of
            d < cutoff. Elements of a dict need not be in the system.
        numbers: (N,) atomic numbers, which a dict needs.
        self_interaction: list each atom with itself too, first in its row. max_nbins: without effect.

    Raises:
        ValueError: unknown quantities; what ASE takes without a word: a cutoff that is not > 0, cutoffs that
            are negative or all 0, radii or numbers that are not (N,), unknown elements, a singular cell on
            periodic axes, where ASE takes a zero vector for 1 Å, values that are not finite.
        TypeError: a dict without numbers; values of wrong types, also cutoffs that are no real numbers.
    """
    if unknown := sorted(set(quantities) - set("ijdDS")):
        raise ValueError(f"`quantities` must be of 'i', 'j', 'd', 'D' and 'S'; got {unknown}")
    positions = np.asarray(positions, dtype=float).reshape(len(positions), 3)
    cell = np.asarray(cell, dtype=float)
    if _common.flag("use_scaled_positions", use_scaled_positions):
        positions = np.dot(positions, cell)
    longest, cutoff_of = _cutoffs(cutoff, numbers, len(positions))
    # The next number up: ASE compares roots and the search squares; none may be lost to rounding.
    reach = math.nextafter(max(longest, 1e-3), math.inf)
    where = (torch.tensor(array, device="cpu") for array in (positions, cell))
    pairs = neighbor_pairs(*where, _common.axes(pbc), reach)
    arrays = *pairs.mapping, pairs.distances, pairs.vectors, pairs.shifts
    found = {name: array.numpy() for name, array in zip("ijdDS", arrays, strict=True)}
    if _common.flag("self_interaction", self_interaction):
        atoms = np.arange(len(positions))
        starts = np.searchsorted(found["i"], atoms)
        found = {x: np.insert(v, starts, atoms if x in "ij" else 0, axis=0) for x, v in found.items()}
    close = found["d"] < cutoff_of(found["i"], found["j"])
    found = found if close.all() else {name: found[name][close] for name in set(quantities)}
    chosen = tuple(found[name].astype(int) if name == "S" else found[name] for name in quantities)
    return chosen[0] if len(chosen) == 1 else chosen


def _cutoffs(cutoff, numbers, num_atoms: int):
    """The largest cutoff, and a function from the atoms i and j of pairs to theirs."""
    if isinstance(cutoff, dict):
        if numbers is None:
            raise TypeError("`numbers` must be given with a dict of cutoffs; got None")
        if np.shape(numbers) != (num_atoms,):
            raise ValueError(f"`numbers` must have shape (N,) = ({num_atoms},); got {np.shape(numbers)}")
        return _cutoffs_of_elements(cutoff, np.asarray(numbers))
    try:
        radii = np.asarray(cutoff)
    except ValueError:
        got = _common.shown(cutoff)
        raise TypeError(f"`cutoff` must be a number or radii that are numbers; got {got}") from None
    if radii.ndim == 0:
        longest = _common.length("cutoff", cutoff)
        return longest, lambda i, j: longest
    if radii.dtype.kind not in "iuf":  # NumPy makes numbers of texts, and drops imaginary parts
        radii = np.array([_common.number("cutoff", radius) for radius in cutoff])
    radii = radii.astype(float)
    if radii.shape != (num_atoms,):
        raise ValueError(f"`cutoff` must be a number or radii (N,) = ({num_atoms},); got shape {radii.shape}")
    return 2 * _longest(radii, lambda atom: f"atom {atom}"), lambda i, j: radii[i] + radii[j]


def _cutoffs_of_elements(cutoff: dict, numbers: np.ndarray):
    from ase.data import atomic_numbers

    species, kinds = np.unique(numbers, return_inverse=True)
    table = np.zeros((len(species), len(species)))
    elements = atomic_numbers | {z: z for z in (*atomic_numbers.values(), *species.tolist())}
    if not cutoff:
        raise ValueError("`cutoff` must have a pair of elements at least; got an empty dict")
    cutoffs = {pair: _common.number("cutoff", value) for pair, value in cutoff.items()}
    longest = _longest(np.array(list(cutoffs.values())), list(cutoffs).__getitem__)
    for pair, value in cutoffs.items():
        names = tuple(pair) if isinstance(pair, Iterable) else (pair,)
        if len(names) != 2 or any(name not in elements for name in names):
            raise ValueError(f"`cutoff` must have pairs of symbols or atomic numbers as keys; got {pair!r}")
        first, second = (species == elements[name] for name in names)
        table[np.outer(first, second) | np.outer(second, first)] = value
    return longest, lambda i, j: table[kinds[i], kinds[j]]


def _longest(cutoffs: np.ndarray, whose) -> float:
    """The largest of cutoffs (M,) that are finite and not negative, and not all 0; 0 of none."""
    if (bad := np.flatnonzero(~(np.isfinite(cutoffs) & (cutoffs >= 0)))).size:
        raise ValueError(f"`cutoff` must be finite and >= 0; got {cutoffs[bad[0]]} for {whose(bad[0])}")
    if len(cutoffs) and not cutoffs.any():
        raise ValueError("`cutoff` must be > 0 for some pair; got 0 for all")
    return float(np.max(cutoffs, initial=0.0))


class _Potential:
    """ASE calculator of energy_fn(positions, cell, pbc, *per_atom) -> energy (), eV: a function or a module.

    It gets positions (N, 3), cell (3, 3) (None if all zero), pbc (3,) bool, and the `atoms.arrays` named in
    `per_atom`, ("numbers",) say, in `dtype` on `device`. Stress, in ASE's sign and order, needs a periodic
    axis and a cell with a volume, which is what it is divided by; ASE's own calculators also give one for a
    molecule in a box. Results stand until the atoms change; when the potential has changed, call `reset()`.
    Autocast around a call is without effect: a potential that wants it switches it on itself.
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
        # In the dtype of the stress: what is a thin volume in float64 may be none in float32.
        cell = torch.tensor(self.atoms.cell.array, dtype=self.dtype, device="cpu")
        has_stress = bool(self.atoms.pbc.any()) and bool(has_volume(cell))
        exact = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), exact:
            positions = self._tensor(self.atoms.positions).requires_grad_()
            cell = self._tensor(self.atoms.cell.array) if self.atoms.cell.any() else None
            per_atom = [self._tensor(self.atoms.arrays[name]) for name in self.per_atom]
            if has_stress:
                cell.requires_grad_()
            energy = self.energy_fn(positions, cell, self._tensor(self.atoms.pbc), *per_atom)
            forces, stress = forces_and_stress(energy, positions, cell if has_stress else None)
        self.results = {"energy": energy.item(), "free_energy": energy.item()}
        self.results["forces"] = forces.double().numpy(force=True)
        if has_stress:
            self.results["stress"] = to_voigt(stress).double().numpy(force=True)


def __getattr__(name):
    """The class is made at its first use, on ASE's, and kept, so that pickles find it."""
    if name != "DiffnlCalculator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ase.calculators.calculator import Calculator

    return globals().setdefault(name, type(name, (_Potential, Calculator), {"__module__": __name__}))
