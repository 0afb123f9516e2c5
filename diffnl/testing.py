"""Checks for potentials built on the layer: are energy, forces and stress what they claim to be?

`check_potential` treats the potential as a black box. Each check compares two numbers that must agree for
every potential that is a smooth function of distances under periodic boundaries, whatever its formula.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from . import _options, _pbc, _validate
from .neighbors import neighbor_pairs
from .stress import forces_and_stress, has_volume, strained

# Finite differences and one-sided limits, as fractions of the cutoff.
LARGEST_STEP = 2e-4
SMALLEST_STEP = 1e-7
CONTINUITY_STEP = 1e-6


@dataclass(frozen=True)
class Check:
    """One row of a report.

    Attributes:
        name: what was checked.
        error: the largest absolute difference met, in `unit`; None where there was nothing to check.
        tolerance: the largest `error` that passes, in `unit`.
        unit: in terms of the potential's own energy and length.
        how: the two things compared, or why there was nothing to check.
    """

    name: str
    error: float | None
    tolerance: float
    unit: str
    how: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not), or there was nothing to check."""
        return self.error is None or self.error <= self.tolerance


@dataclass(frozen=True, repr=False)
class Report:
    """The checks of a potential: true if all have passed, and a table when printed."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that have not passed."""
        return [check.name for check in self.checks if not check.passed]

    def __bool__(self) -> bool:
        return not self.failed

    def __repr__(self) -> str:
        rows = [("check", "", "error", "tolerance", "unit", "compared")]
        for check in self.checks:
            verdict = "-" if check.error is None else "ok" if check.passed else "FAILED"
            error = "" if check.error is None else f"{check.error:.1e}"
            rows.append((check.name, verdict, error, f"{check.tolerance:.1e}", check.unit, check.how))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(["", *lines])


class _Frame(NamedTuple):
    positions: Tensor  # (N, 3)
    cell: Tensor | None  # (3, 3)
    per_atom: tuple[Tensor, ...]  # (N, ...) each


class _Answer(NamedTuple):
    energy: Tensor  # ()
    forces: Tensor  # (N, 3)
    stress: Tensor | None  # (3, 3); None without a cell that has a volume


def check_potential(
    energy_fn: Callable[..., Tensor | tuple],
    positions: Tensor,
    cell: Tensor | None,
    pbc: bool | Sequence[bool] | Tensor | None,
    per_atom: Sequence[Tensor] = (),
    *,
    cutoff: float,
    rattle: float = 0.01,
    rtol: float = 1e-6,
    seed: int = 0,
) -> Report:
    """Checks energy, forces, stress and second derivatives of a potential, and their invariances.

    - forces: against five-point differences of the energy along random directions of all atoms.
    - stress: against five-point differences under the six strains, sigma = (1/V) dE/d(eps), positive
      under tension.
    - second derivatives: autograd's, in positions and strain, against five-point differences of autograd's
      first ones.
    - translation; rotation; permutation of the atoms; periodic images (single atoms moved by lattice
      vectors); basis (the same lattice spanned by other vectors, left-handed for right-handed); supercell
      (twice as long on each periodic axis): the same energy per atom, forces and stress, turned or
      reordered with the atoms.
    - cutoff, energy and cutoff, forces: the one-sided limits agree where the system, scaled as a whole,
      brings a pair to the cutoff.

    All run on a copy of the system that is displaced and strained at random, so that nothing vanishes by
    symmetry, and chosen among a few such copies as the one with no pair close to the cutoff: finite
    differences never cross it. The five-point formula is 25.3.6 of Abramowitz and Stegun (1964).

    Args:
        energy_fn: called as energy_fn(positions, cell, pbc, *per_atom); returns the energy, () or (1,), whose
            forces and stress are then taken by `forces_and_stress`; or a tuple (energy, forces (N, 3),
            stress (3, 3) or None) with its own, which are then the ones checked.
        positions: (N, 3) float64, any length unit.
        cell: (3, 3), same dtype, rows are lattice vectors; None: no stress, no periodicity.
        pbc: which axes are periodic: a bool, three bools or integers 0 and 1, or a tensor (3,) of these. None
            without a cell only.
        per_atom: tensors (N, ...) that belong to the atoms and do not turn with them, such as species.
        cutoff: > 0, the length beyond which two atoms do not interact directly, in the unit of `positions`.
        rattle: standard deviation of the random displacements, as a fraction of the cutoff, and of the random
            strain. 0: check exactly this system.
        rtol: tolerance of all checks, relative to the largest force F: forces F, energy per atom F cutoff,
            stress N F cutoff / V, second derivatives F / cutoff N.
        seed: of everything random.

    Returns:
        The report, true if all is well: `assert report, str(report)` shows the table where not.

    Raises:
        ValueError: wrong shapes, devices or values; a cell without `pbc`.
        TypeError: wrong types or dtypes; `positions` not in float64, whose rounding the tolerances assume.
        Whatever `energy_fn` raises.
    """
    positions = _validate.double("positions", _validate.positions(positions)).detach()
    cell = None if cell is None else _validate.one_cell(_validate.cell(cell, positions)).detach()
    pbc = _validate.one_pbc(_pbc.flags(pbc, positions, cell))
    cutoff = _options.cutoff(cutoff)
    rattle, rtol = _options.not_negative("rattle", rattle), _options.not_negative("rtol", rtol)
    per_atom = tuple(_validate.per_atom(values, positions) for values in per_atom)
    random = torch.Generator().manual_seed(seed)
    frame = _rattled(_Frame(positions, cell, per_atom), pbc, cutoff, rattle, random)
    return Report(tuple(_Checker(energy_fn, frame, pbc, cutoff, rtol, random).checks()))


class _Checker:
    def __init__(self, energy_fn, frame: _Frame, pbc: Tensor, cutoff: float, rtol: float, random):
        self.energy_fn = energy_fn
        self.frame = frame
        self.pbc = pbc
        self.periodic = [] if frame.cell is None else pbc.nonzero().flatten().tolist()
        self.cutoff = cutoff
        self.rtol = rtol
        self.random = random
        # Five points reach two steps to each side; a unit step of two atoms changes their distance by two.
        step = _gap_to_cutoff(frame, pbc, cutoff) / 5
        self.step = min(max(step, SMALLEST_STEP * cutoff), LARGEST_STEP * cutoff)
        # In float64, as all that is checked: torch lowers the precision of no product of these.
        self.volume = None
        if frame.cell is not None and bool(has_volume(frame.cell)):
            self.volume = float(torch.linalg.det(frame.cell).abs())
        self.here = self.answer(frame)

    def checks(self) -> Iterator[Check]:
        # The scale of all tolerances comes from both sides of the first comparison: one of them may be wrong.
        error, slope = self.forces_error()
        scale = max(float(self.here.forces.abs().max()), slope)
        num_atoms = len(self.frame.positions)
        self.force_tolerance = self.rtol * scale
        self.energy_tolerance = self.force_tolerance * self.cutoff
        self.stress_tolerance = math.nan
        if self.volume is not None:
            self.stress_tolerance = self.energy_tolerance * num_atoms / self.volume

        yield self.check("forces", "force", error, "with -dE/dr by finite differences")
        if scale == 0.0:
            yield self.check("not constant", "force", math.nan, "no atom feels a force: nothing is checked")
        yield self.check("stress", "stress", *self.stress_error())
        yield self.check("second derivatives", "second", *self.second_derivatives_error())
        for name, how, other, atoms, turn in self.transformed():
            yield from self.same(name, how, other, atoms, turn)
        yield from self.continuous()

    def check(self, name: str, kind: str, error: float | None, how: str) -> Check:
        tolerance, unit = {
            "energy": (self.energy_tolerance, "energy/atom"),
            "force": (self.force_tolerance, "energy/length"),
            "stress": (self.stress_tolerance, "energy/length^3"),
            "second": (
                self.force_tolerance * len(self.frame.positions) / self.cutoff,
                "energy/length^2",
            ),
        }[kind]
        return Check(name, error, tolerance, unit, how)

    def evaluate(self, positions: Tensor, cell: Tensor | None, per_atom: tuple[Tensor, ...]):
        found = self.energy_fn(positions, cell, self.pbc, *per_atom)
        energy, *own = found if isinstance(found, tuple) else (found,)
        return energy.sum(), own

    def answer(self, frame: _Frame) -> _Answer:
        positions = frame.positions.clone().requires_grad_()
        cell = None if frame.cell is None else frame.cell.clone().requires_grad_()
        energy, own = self.evaluate(positions, cell, frame.per_atom)
        if own:
            forces, stress = own
        else:
            # A constant, as far as autograd can tell, has no forces, and the report says where that is wrong.
            forces, stress = forces_and_stress(energy + 0.0 * positions.sum(), positions, cell)
        stress = None if stress is None or self.volume is None else stress.detach().reshape(3, 3)
        return _Answer(energy.detach(), forces.detach(), stress)

    def energy_at(self, displacement: Tensor | float, strain: Tensor | float) -> Tensor:
        """() the energy after r -> (r + displacement) (1 + strain), h -> h (1 + strain)."""
        positions, cell, per_atom = self.frame
        positions = positions + displacement
        if cell is None or isinstance(strain, float):
            return self.evaluate(positions, cell, per_atom)[0]
        return self.evaluate(*strained(positions, cell, strain), per_atom)[0]

    def normal(self, *shape: int) -> Tensor:
        return _normal(self.random, self.frame.positions, *shape)

    def direction(self) -> tuple[Tensor, Tensor]:
        """A random unit displacement (N, 3), and a random symmetric strain (3, 3) that moves as far."""
        move = self.normal(*self.frame.positions.shape)
        bend = self.normal(3, 3)
        bend = bend + bend.mT
        return move / move.norm(), bend / (bend.norm() * self.cutoff)

    def forces_error(self) -> tuple[float, float]:
        """The largest difference met, and the largest slope of the energy."""
        error = slope = 0.0
        with torch.no_grad():
            for _ in range(6):
                u, _ = self.direction()
                numeric = float(_derivative(lambda t, u=u: self.energy_at(t * u, 0.0), self.step))
                error = _larger(error, abs(numeric + float((self.here.forces * u).sum())))
                slope = max(slope, abs(numeric))
        return error, slope

    def stress_error(self) -> tuple[float | None, str]:
        if self.volume is None:
            return None, "not checked: no cell, or one without a volume"
        if self.here.stress is None:
            return None, "not checked: the potential gives none"
        error = 0.0
        with torch.no_grad():
            for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
                eps = torch.zeros_like(self.frame.cell)
                eps[a, b] += 0.5
                eps[b, a] += 0.5
                numeric = _derivative(
                    lambda t, eps=eps: self.energy_at(0.0, t * eps), self.step / self.cutoff
                )
                of_both = 0.5 * (self.here.stress[a, b] + self.here.stress[b, a])
                error = _larger(error, abs(float(numeric / self.volume - of_both)))
        error = _larger(error, float((self.here.stress - self.here.stress.mT).abs().max()))
        return error, "with (1/V) dE/d(strain) by finite differences"

    def second_derivatives_error(self) -> tuple[float, str]:
        error = 0.0
        for _ in range(4):
            (along_r, along_eps), towards = self.direction(), self.direction()

            def gradient(x, eps, towards=towards):
                """() the slope of the energy towards a direction, with a graph."""
                return _inner(_gradients(self.energy_at(x, eps), (x, eps)), towards)

            def slope(t, r=along_r, eps=along_eps, gradient=gradient):
                return gradient((t * r).requires_grad_(), (t * eps).requires_grad_()).detach()

            x, eps = torch.zeros_like(along_r, requires_grad=True), torch.zeros_like(along_eps)
            eps.requires_grad_()
            try:
                second = _inner(_gradients(gradient(x, eps), (x, eps)), (along_r, along_eps))
            except RuntimeError as failure:
                return math.nan, f"autograd refuses: {str(failure).splitlines()[0]}"
            error = _larger(error, abs(float(second.detach() - _derivative(slope, self.step))))
        return error, "autograd's with differences of the first ones"

    def transformed(self) -> Iterator[tuple]:
        """(name, what was done, the new frame or None, atom of each old atom there, rotation or None)."""
        positions, cell, per_atom = frame = self.frame
        atoms = torch.arange(len(positions), device=positions.device)
        yield (
            "translation",
            "all atoms moved",
            frame._replace(positions=positions + self.normal(3)),
            atoms,
            None,
        )

        q, _ = torch.linalg.qr(self.normal(3, 3))
        q = q * torch.linalg.det(q).sign()
        turned = None if cell is None else cell @ q
        yield "rotation", "atoms and cell turned", _Frame(positions @ q, turned, per_atom), atoms, q

        order = torch.randperm(len(atoms), generator=self.random, device="cpu").to(atoms.device)
        mixed = _Frame(positions[order], cell, tuple(values[order] for values in per_atom))
        yield "permutation", "atoms in another order", mixed, order.argsort(), None

        if not self.periodic:
            for name in ("periodic images", "basis", "supercell"):
                yield name, "not checked: no periodic axis", None, atoms, None
            return

        moves = torch.randint(-2, 3, (len(atoms), 3), generator=self.random, device="cpu").to(positions)
        moves[0] = 1.0  # Whatever was drawn, one atom moves.
        moved = positions + (moves * self.pbc) @ cell
        yield (
            "periodic images",
            "atoms moved by lattice vectors",
            frame._replace(positions=moved),
            atoms,
            None,
        )

        basis = torch.eye(3, dtype=cell.dtype, device=cell.device)
        first, last = self.periodic[0], self.periodic[-1]
        for a, b in zip(self.periodic, self.periodic[1:], strict=False):
            basis[a] += basis[b]
        if first != last:
            basis[last] -= basis[first]
        basis[first] *= -1.0
        yield "basis", "the same lattice from other vectors", frame._replace(cell=basis @ cell), atoms, None

        times = [1 + (axis in self.periodic) for axis in range(3)]
        copies = positions.new_tensor(list(product(*map(range, times))))
        larger = _Frame(
            (positions + (copies @ cell).unsqueeze(1)).reshape(-1, 3),
            cell * cell.new_tensor(times).unsqueeze(1),
            tuple(torch.cat([values] * len(copies)) for values in per_atom),
        )
        yield "supercell", f"{times[0]} x {times[1]} x {times[2]} cells", larger, atoms, None

    def same(self, name: str, how: str, other: _Frame | None, atoms: Tensor, turn) -> Iterator[Check]:
        """Energy per atom, forces and stress of `other` against those of the frame."""
        if other is None:
            yield self.check(name, "energy", None, how)
            return
        here, there = self.here, self.answer(other)
        per_atom = here.energy / len(self.frame.positions) - there.energy / len(other.positions)
        yield self.check(f"{name}: energy", "energy", abs(float(per_atom)), how)

        forces, stress = here.forces, here.stress
        if turn is not None:
            forces, stress = forces @ turn, None if stress is None else turn.mT @ stress @ turn
        copies = there.forces.reshape(-1, len(forces), 3)[:, atoms]
        yield self.check(f"{name}: forces", "force", float((copies - forces).abs().max()), how)
        if stress is not None and there.stress is not None:
            yield self.check(f"{name}: stress", "stress", float((there.stress - stress).abs().max()), how)

    def continuous(self) -> Iterator[Check]:
        """Energy and forces on both sides of the cutoff, for the pairs that are closest to it."""
        distances = _distances(self.frame, self.pbc, 1.5 * self.cutoff)
        distances = distances[distances > 0.5 * self.cutoff].unique()
        near = distances[(distances - self.cutoff).abs().argsort()][:5].tolist()
        if not near:
            for name, kind in (("cutoff: energy", "energy"), ("cutoff: forces", "force")):
                yield self.check(name, kind, None, "not checked: no pair near the cutoff")
            return
        energy = forces = 0.0
        for distance in near:

            def limit(step, distance=distance) -> _Answer:
                """From one side, to first order: 2 f(step) - f(2 step)."""
                one, two = (
                    self.answer(_scaled(self.frame, self.cutoff / distance * (1.0 + k * step)))
                    for k in (1, 2)
                )
                return _Answer(2 * one.energy - two.energy, 2 * one.forces - two.forces, None)

            inside, outside = limit(-CONTINUITY_STEP), limit(CONTINUITY_STEP)
            energy = _larger(energy, abs(float(outside.energy - inside.energy)))
            forces = _larger(forces, float((outside.forces - inside.forces).abs().max()))
        how = f"limits from both sides, {len(near)} pairs"
        yield self.check("cutoff: energy", "energy", energy / len(self.frame.positions), how)
        yield self.check("cutoff: forces", "force", forces, how)


def _derivative(f: Callable[[float], Tensor], step: float) -> Tensor:
    return (8.0 * (f(step) - f(-step)) - (f(2.0 * step) - f(-2.0 * step))) / (12.0 * step)


def _larger(a: float, b: float) -> float:
    """max that keeps a NaN: what cannot be compared has not passed."""
    return b if b > a or math.isnan(b) else a


def _gradients(value: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients with a graph; zeros of what has none."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)


def _inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def _normal(random: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Drawn on the CPU, so that every device gets the same numbers."""
    return torch.randn(*shape, generator=random, dtype=like.dtype, device="cpu").to(like.device)


def _scaled(frame: _Frame, factor: float) -> _Frame:
    cell = None if frame.cell is None else frame.cell * factor
    return frame._replace(positions=frame.positions * factor, cell=cell)


def _distances(frame: _Frame, pbc: Tensor, cutoff: float) -> Tensor:
    return neighbor_pairs(frame.positions, frame.cell, pbc, cutoff, full=False).distances


def _gap_to_cutoff(frame: _Frame, pbc: Tensor, cutoff: float) -> float:
    gaps = (_distances(frame, pbc, 1.1 * cutoff) - cutoff).abs()
    return float(gaps.min()) if len(gaps) else cutoff


def _rattled(frame: _Frame, pbc: Tensor, cutoff: float, rattle: float, random: torch.Generator) -> _Frame:
    """Of ten random copies, the one whose pairs keep farthest from the cutoff."""
    if rattle == 0.0:
        return frame
    copies = []
    for _ in range(10):
        positions = frame.positions + rattle * cutoff * _normal(
            random, frame.positions, *frame.positions.shape
        )
        bend = rattle * _normal(random, frame.positions, 3, 3)
        if frame.cell is None:
            copies.append(frame._replace(positions=positions))
        else:
            copies.append(_Frame(*strained(positions, frame.cell, 0.5 * (bend + bend.mT)), frame.per_atom))
    return max(copies, key=lambda copy: _gap_to_cutoff(copy, pbc, cutoff))
