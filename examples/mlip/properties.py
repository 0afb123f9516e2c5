"""Properties of a crystal that are derivatives of a trained potential, and each of them a second way.

    elastic constants    second derivatives by strain and atoms        finite differences of stresses
    phonons              rows of the Hessian of a supercell            phonopy's finite displacements
    bulk modulus         from the elastic constants                    a fit to energies over volumes

The first way differentiates through `diffnl.NeighborList` twice; the second needs energies, forces and
stresses only. Both are statements about one smooth function and must agree whatever the potential has learnt.
Potentials and calculators are to be in float64: differences divide the rounding of forces by a small step.
"""

from __future__ import annotations

from dataclasses import dataclass

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator
from ase.dft.kpoints import parse_path_string
from ase.eos import EquationOfState
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_strain
from ase.units import GPa

from diffnl.stress import from_voigt, strained

from .calculator import inputs_of, relax_cell
from .data import Frame
from .model import Potential
from .progress import track, watch

# ---- second derivatives through the layer ----


def hessian_rows(energy: torch.Tensor, x: torch.Tensor, rows) -> torch.Tensor:
    """Rows d2E/dx_k dx, (len(rows), X), of the Hessian of `energy` () by all X entries of `x`.

    A backward for each row, one after the other, over the graph of one gradient: memory is that of one
    energy and its gradient, however many rows there are.
    """
    (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
    gradient = gradient.reshape(-1)
    found = []
    for k in track(rows, "rows of the Hessian", "row"):
        found.append(torch.autograd.grad(gradient[k], x, retain_graph=True)[0].reshape(-1))
    return torch.stack(found)


def strain_hessian(atoms: ase.Atoms, potential: Potential) -> np.ndarray:
    """d2E/dx2 (6 + 3N, 6 + 3N) in eV and Å, of x = six Voigt strains (shears doubled), then displacements.

    The crystal at x: r -> r (1 + strain) + u, h -> h (1 + strain).
    """
    numbers, positions, cell, pbc, system_idx = inputs_of(potential, atoms)
    x = positions.new_zeros(6 + positions.numel(), requires_grad=True)
    halves = x.new_tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    moved, cell = strained(positions, cell, from_voigt(x[:6] * halves)[None], system_idx)
    energy = potential(numbers, moved + x[6:].reshape(-1, 3), cell, pbc, system_idx)[0]
    return hessian_rows(energy, x, range(len(x))).cpu().numpy()


@dataclass(frozen=True)
class Elastic:
    """Elastic constants, (6, 6) in GPa and Voigt order: with the atoms held at their fractional positions,
    and with the atoms free to find their places in the strained cell."""

    held: np.ndarray
    relaxed: np.ndarray


def elastic_constants(atoms: ase.Atoms, potential: Potential) -> Elastic:
    """Second derivatives of the energy of `atoms`, which must be free of forces and stress (`relax`).

    C = (E_ee - E_eu (E_uu)^+ E_ue) / V, e the strains and u the displacements (M. Born and K. Huang,
    Dynamical Theory of Crystal Lattices, 1954, section 11); ^+ is the pseudo-inverse, for translations cost
    nothing. Under a stress, derivatives by linear and by Lagrangian strain and of the Cauchy stress differ by
    terms of the order of that stress; without it they are one thing, and that of `elastic_by_differences`.
    """
    hessian = strain_hessian(atoms, potential)
    strains, coupling, forces = hessian[:6, :6], hessian[:6, 6:], hessian[6:, 6:]
    relaxation = coupling @ np.linalg.pinv(forces, rcond=1e-8, hermitian=True) @ coupling.T
    volume = atoms.get_volume() * GPa
    return Elastic(strains / volume, (strains - relaxation) / volume)


def force_constants(atoms: ase.Atoms, potential: Potential, rows=None) -> np.ndarray:
    """d2E/dr_a dr_b (A, N, 3, 3) in eV/Å², phonopy's layout, of the A atoms `rows` (None: all) with all N."""
    rows = range(len(atoms)) if rows is None else rows
    numbers, positions, *rest = inputs_of(potential, atoms)
    positions.requires_grad_()
    energy = potential(numbers, positions, *rest)[0]
    hessian = hessian_rows(energy, positions, [3 * int(a) + axis for a in rows for axis in range(3)])
    return hessian.reshape(len(rows), 3, len(atoms), 3).transpose(1, 2).cpu().numpy()


# ---- the same from energies, forces and stresses ----


def relax(atoms: ase.Atoms, calculator: Calculator, fmax: float = 1e-6, steps: int = 3000) -> ase.Atoms:
    """`atoms` with cell and positions where forces and stress vanish: FIRE on both.

    `fmax` in eV/Å bounds the forces, and in eV the virial by the number of atoms. Raises RuntimeError if
    `steps` do not suffice.
    """
    atoms = atoms.copy()
    atoms.calc = calculator
    with watch("relaxation of cell and atoms"):
        converged, _ = relax_cell(atoms, fmax, steps)
    if not converged:
        raise RuntimeError(f"the cell is not relaxed after {steps} steps of FIRE: is the crystal stable?")
    return atoms


def relax_atoms(atoms: ase.Atoms, fmax: float = 1e-8, steps: int = 500) -> ase.Atoms:
    """Moves the atoms in their cell until no force is larger than `fmax` (eV/Å). Raises RuntimeError."""
    if not BFGS(atoms, logfile=None).run(fmax=fmax, steps=steps):
        raise RuntimeError(f"forces above {fmax} eV/Å after {steps} steps of BFGS: is the crystal stable?")
    return atoms


def strained_stress(atoms: ase.Atoms, calculator: Calculator, strain: np.ndarray, free: bool) -> np.ndarray:
    """Stress (6,) in GPa of `atoms` under a Voigt strain (6,), the atoms held or `free` to move."""
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ voigt_6_to_full_3x3_strain(strain), scale_atoms=True)
    moved.calc = calculator
    return (relax_atoms(moved) if free else moved).get_stress() / GPa


def elastic_by_differences(atoms: ase.Atoms, calculator: Calculator, step: float = 5e-4) -> Elastic:
    """Central differences of the Cauchy stress by strain, at zero stress equal to `elastic_constants`.

    The error is of second order in `step`, about 1e-5 of a constant for the default.
    """
    parts = np.empty((2, 6, 6))
    for free, k in track([(free, k) for free in (0, 1) for k in range(6)], "strained cells", "strain"):
        strain = step * np.eye(6)[k]
        plus, minus = (strained_stress(atoms, calculator, s * strain, bool(free)) for s in (1, -1))
        parts[free, :, k] = (plus - minus) / (2 * step)
    return Elastic(*parts)


def cubic_constants(constants: np.ndarray) -> np.ndarray:
    """C11, C12, C44 (3,) of a (6, 6) whose cubic axes are x, y, z: means over the equivalent entries."""
    off = constants[:3, :3][~np.eye(3, dtype=bool)]
    return np.array([constants.diagonal()[:3].mean(), off.mean(), constants.diagonal()[3:].mean()])


@dataclass(frozen=True)
class Curve:
    """`volumes` (M,) in Å³/atom and `energies` (M,) in eV/atom, and a Birch-Murnaghan curve through them.

    Of the curve: `fit` (2, 100), volumes and energies; `volume` and `energy` at its minimum, and the `bulk`
    modulus there in GPa.
    """

    volumes: np.ndarray
    energies: np.ndarray
    fit: np.ndarray
    volume: float
    energy: float
    bulk: float


def energies_over_volumes(
    atoms: ase.Atoms, calculator: Calculator, span: float = 0.06
) -> tuple[np.ndarray, np.ndarray]:
    """Volumes (13,) in Å³/atom within 1 +- `span` of that of `atoms`, and energies (13,) in eV/atom.

    The shape is kept, the atoms relax. Raises RuntimeError with the volume where they do not.
    """
    volumes, energies = [], []
    for factor in track(np.linspace(1 - span, 1 + span, 13), "equation of state", "volume"):
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * factor ** (1 / 3), scale_atoms=True)
        scaled.calc = calculator
        try:
            relax_atoms(scaled, fmax=1e-6)
        except RuntimeError as error:
            raise RuntimeError(f"at {factor:.2f} times the volume of the crystal: {error}") from error
        volumes.append(scaled.get_volume() / len(atoms))
        energies.append(scaled.get_potential_energy() / len(atoms))
    return np.array(volumes), np.array(energies)


def fit_curve(volumes: np.ndarray, energies: np.ndarray) -> Curve:
    """The Birch-Murnaghan curve through them. Raises RuntimeError if it has no minimum between them."""
    between = f"between {volumes[0]:.2f} and {volumes[-1]:.2f} Å³/atom"
    if not 0 < energies.argmin() < len(energies) - 1:  # NaN too: its place counts as that of the minimum
        raise RuntimeError(f"the energies have no minimum {between}")
    curve = EquationOfState(volumes, energies, eos="birchmurnaghan")
    try:
        volume, energy, bulk = curve.fit(warn=False)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"no Birch-Murnaghan curve fits the energies {between}: {error}") from error
    fine = np.linspace(volumes[0], volumes[-1], 100)
    fit = np.stack([fine, curve.func(fine, *curve.eos_parameters)])
    return Curve(volumes, energies, fit, float(volume), float(energy), float(bulk / GPa))


# ---- phonons ----


@dataclass(frozen=True)
class Bands:
    """Phonon frequencies in THz, imaginary ones negative, along a path of straight lines.

    `segments`: the labels of the ends of each line; `distances`: (Q,) of each line, in 1/Å; `derivative` and
    `differences`: (Q, modes) of each line; `largest`: the largest difference between the two; `atoms`: how
    many the supercell has.

    What either way computes are the squares, eigenvalues of a matrix; `apart` is their largest difference,
    relative to the largest of them. Frequencies near zero differ by the root of that and say little.
    """

    segments: list[tuple[str, str]]
    distances: list[np.ndarray]
    derivative: list[np.ndarray]
    differences: list[np.ndarray]
    largest: float
    apart: float
    atoms: int

    @property
    def highest(self) -> float:
        return max(float(curve.max()) for curve in self.derivative)

    def lowest(self) -> tuple[float, str]:
        """The lowest frequency, and the line it is on, like "G-X"."""
        lows = [float(curve.min()) for curve in self.derivative]
        k = int(np.argmin(lows))
        return lows[k], "-".join(self.segments[k])


def band_path(cell: ase.cell.Cell, points: int) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """Lines through reciprocal space: labels of their ends, and (points, 3) in units of the reciprocal cell.

    Gamma-X-K-Gamma-L for the fcc lattice: X to U, which is equivalent to K, is that line's part beyond the
    first zone. ASE's path for any other lattice.
    """
    lattice = cell.get_bravais_lattice()
    path = cell.bandpath("GXU,KGL" if lattice.name == "FCC" else lattice.special_path, npoints=0)
    segments = [pair for names in parse_path_string(path.path) for pair in zip(names, names[1:])]  # noqa: B905
    ends = path.special_points
    fractions = np.linspace(0, 1, points)[:, None]
    return segments, [ends[first] + fractions * (ends[last] - ends[first]) for first, last in segments]


def default_supercell(atoms: ase.Atoms, at_least: int = 100) -> int:
    """How often to repeat the cell each way for `at_least` atoms."""
    return int(np.ceil((at_least / len(atoms)) ** (1 / 3) - 1e-9))


def phonon_bands(
    atoms: ase.Atoms,
    potential: Potential,
    calculator: Calculator,
    supercell: int | None = None,
    points: int = 41,
    displacement: float = 0.005,
) -> Bands:
    """Bands of a relaxed crystal, from the Hessian and from phonopy's finite displacements (Å).

    phonopy makes the dynamical matrix of either set of force constants, in a supercell of so many cells each
    way, and imposes the same sum rules and index symmetry on both. Force constants reach up to twice as far
    as messages; in a smaller supercell they are folded, alike in both.
    """
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    repeat = supercell or default_supercell(atoms)
    unit = PhonopyAtoms(numbers=atoms.numbers, cell=atoms.cell.array, positions=atoms.positions)
    phonon = Phonopy(unit, supercell_matrix=repeat * np.eye(3, dtype=int), primitive_matrix="auto")
    phonon.generate_displacements(distance=displacement)
    large = to_ase(phonon.supercell)
    by_derivative = force_constants(large, potential, phonon.primitive.p2s_map)
    forces = []
    for displaced in track(phonon.supercells_with_displacements, "displaced supercells", "supercell"):
        moved = to_ase(displaced)
        moved.calc = calculator
        forces.append(moved.get_forces())
    phonon.forces = forces
    phonon.produce_force_constants(calculate_full_force_constants=False)
    segments, lines = band_path(ase.cell.Cell(phonon.primitive.cell), points)
    frequencies = {}
    for name, constants in (("derivative", by_derivative), ("differences", phonon.force_constants)):
        phonon.force_constants = constants
        phonon.symmetrize_force_constants()
        phonon.run_band_structure(lines)
        frequencies[name] = phonon.band_structure.frequencies
    distances = phonon.band_structure.distances
    first, second = (np.concatenate(curves) for curves in frequencies.values())
    largest = float(np.abs(first - second).max())
    squares, others = first * np.abs(first), second * np.abs(second)
    apart = float(np.abs(squares - others).max() / np.abs(squares).max())
    return Bands(segments, distances, **frequencies, largest=largest, apart=apart, atoms=len(large))


def to_ase(crystal) -> ase.Atoms:
    """phonopy's atoms as ASE's."""
    return ase.Atoms(crystal.symbols, crystal.positions, cell=crystal.cell, pbc=True)


# ---- elastic constants from labelled structures ----


def strained_family(frames: list[Frame]) -> list[Frame]:
    """The largest set of frames that are one crystal but for strain: alike in their fractional positions.

    Alike is within 0.05 Å, for some sets shake the atoms of a strained cell a little. The frame that the
    others are compared with has no force above 0.5 eV/Å, which leaves hot trajectories out.
    """
    same: dict[bytes, list[Frame]] = {}
    for frame in frames:
        if frame.has_stress and bool(frame.pbc.all()):
            same.setdefault(frame.numbers.numpy().tobytes(), []).append(frame)
    family: list[Frame] = []
    for group in same.values():
        fractions = torch.stack([frame.positions @ torch.linalg.inv(frame.cell) for frame in group])
        for k, frame in enumerate(group):
            if frame.forces.abs().max() < 0.5:
                apart = fractions - fractions[k]
                near = ((apart - apart.round()) @ frame.cell).norm(dim=2).amax(1) < 0.05
                if near.sum() > len(family):
                    family = [group[m] for m in near.nonzero()[:, 0].tolist()]
    return family


def elastic_from_frames(frames: list[Frame]) -> dict[str, tuple[float, float]]:
    """C11, C12, C44 in GPa, the atoms held, from the strained cells among labelled frames of a cubic crystal.

    The axes of the crystal lie along x, y, z. Used are cells of one Voigt component of the Lagrangian strain
    E = (F F^T - 1) / 2, h = h0 F, the others below a tenth of it. The stress is fitted by a polynomial in
    that component; its slope at zero, where the cell is taken to be free of stress, is the constant.

    Returns name -> (value, by how much the inner half of the strains gives another one); a name is absent
    where there are fewer than four strains.
    """
    family = strained_family(frames)
    if not family:
        return {}
    # Two of the three vectors are as they were in any cell that is looked for.
    side = np.median([np.linalg.norm(frame.cell.numpy(), axis=1) for frame in family])
    samples: dict[str, list[tuple[float, float]]] = {"C11": [], "C12": [], "C44": []}
    for frame in family:
        gradient = frame.cell.numpy() / side
        strain = full_3x3_to_voigt_6_stress(gradient @ gradient.T - np.eye(3)) / [2, 2, 2, 1, 1, 1]
        stress = frame.stress.numpy() / GPa
        k = int(np.abs(strain).argmax())
        if np.abs(np.delete(strain, k)).max() > max(0.1 * abs(strain[k]), 1e-4):
            continue
        if k < 3:
            samples["C11"].append((strain[k], stress[k, k]))
            samples["C12"] += [(strain[k], stress[a, a]) for a in range(3) if a != k]
        else:
            # The one shear stress that a cubic crystal has, in whatever order the file lists the shears.
            shear = np.linalg.norm(stress[np.triu_indices(3, 1)])
            samples["C44"].append((strain[k], np.sign(strain[k]) * shear))
    found = {}
    for name, points in samples.items():
        x, y = np.array(points).reshape(-1, 2).T
        inner = np.abs(x) <= np.median(np.unique(np.abs(x).round(4))) + 1e-4 if len(x) else x > 0
        counts = [len(np.unique(x[part].round(4))) for part in (x == x, inner)]
        if counts[0] >= 4 and x[inner].min() < 0 < x[inner].max():
            whole = np.polyfit(x, y, min(4, counts[0] - 1))[-2]
            half = np.polyfit(x[inner], y[inner], min(3, counts[1] - 1))[-2]
            found[name] = (float(whole), float(abs(whole - half)))
    return found
