"""Elastic constants and zone-centre phonons of Lennard-Jones crystals from second derivatives through diffnl.

    python examples/elastic_constants.py                       # argon, a few seconds
    python examples/elastic_constants.py --epsilon 1 --sigma 1 --cutoff 2.5

The energy of a crystal is a function of a strain and of the displacements of its atoms,

    x = (strain, u):    r -> r (1 + strain) + u,    h -> h (1 + strain),    E(x) = 1/2 sum_pairs phi(|v|)

and everything here is read off its gradient and its Hessian at x = 0, which torch.func takes through
`diffnl.NeighborList`:

    zero-stress cell     Newton's method on x itself, so the cell and the atoms relax together
    elastic constants    C = (E_ee - E_eu (E_uu)^+ E_ue) / V    (^+: pseudo-inverse, translations are free)
    dynamical matrix     D = E_uu / mass at Gamma, eigenvalues omega^2

E_ee / V alone is the clamped-ion constant; the second term is what the atoms gain by moving inside the cell.
It vanishes in fcc, where every atom is an inversion centre, and not in hcp. At a stress sigma, the derivative
by linear strain, the one by Lagrangian strain and the slope of the stress differ by terms of the order of
sigma. All is therefore done at zero stress, where the three agree and C is unambiguous.

The other column uses neither diffnl nor autograd: numpy sums of hand-written phi', phi'' over lattice
vectors, with the Born-Huang formulas (M. Born and K. Huang, Dynamical Theory of Crystal Lattices, 1954,
chapter V), at zero-stress lattice constants of its own. phi is Lennard-Jones times a switch that is C2 at
both ends, so both columns are the same function and must agree to `TOLERANCE`; the exit status is 1 if not.
"""

import argparse
import math
import sys
from typing import NamedTuple

import numpy as np
import torch

import diffnl

TOLERANCE = 1e-8
GPA = 160.2176634  # GPa in 1 eV/Å^3
THZ = math.sqrt(9648.533212331) / (2 * math.pi)  # frequency in THz of omega^2 = 1 eV/(Å^2 u)
VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
# Engineering shear: component 4 is 2 * strain_yz, and so on.
VOIGT_STRAINS = np.zeros((6, 3, 3))
for _row, (_a, _b) in enumerate(VOIGT):
    VOIGT_STRAINS[_row, _a, _b] += 0.5
    VOIGT_STRAINS[_row, _b, _a] += 0.5


class LennardJones(NamedTuple):
    """4 epsilon [(sigma/r)^12 - (sigma/r)^6] f(r), f falling from 1 at `onset` to 0 at `cutoff`.

    f(t) = 1 - 10 t^3 + 15 t^4 - 6 t^5 with t = (r - onset)/(cutoff - onset): f' = f'' = 0 at both ends, so a
    shell of neighbours on the cutoff adds nothing to a second derivative, listed or not.
    """

    epsilon: float = 0.01032  # eV
    sigma: float = 3.405  # Å
    cutoff: float = 3.0 * 3.405  # Å
    mass: float = 39.948  # u

    @property
    def onset(self) -> float:
        """Å."""
        return 0.8 * self.cutoff

    def energy(self, distances: torch.Tensor) -> torch.Tensor:
        """phi(r), eV, of `distances` (P,) in Å."""
        attraction = (self.sigma / distances) ** 6
        t = ((distances - self.onset) / (self.cutoff - self.onset)).clamp(0.0, 1.0)
        switch = 1.0 - t**3 * (10.0 - 15.0 * t + 6.0 * t**2)
        return 4.0 * self.epsilon * (attraction**2 - attraction) * switch

    def slopes(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """phi'(r) and phi''(r), eV/Å and eV/Å^2, differentiated by hand: for the lattice sums only."""
        s6 = (self.sigma / r) ** 6
        lj = 4 * self.epsilon * (s6**2 - s6)
        lj1 = 4 * self.epsilon * (-12 * s6**2 + 6 * s6) / r
        lj2 = 4 * self.epsilon * (156 * s6**2 - 42 * s6) / r**2
        width = self.cutoff - self.onset
        t = np.clip((r - self.onset) / width, 0, 1)
        f = 1 - 10 * t**3 + 15 * t**4 - 6 * t**5
        f1 = -30 * t**2 * (1 - t) ** 2 / width
        f2 = -60 * t * (1 - t) * (1 - 2 * t) / width**2
        return lj1 * f + lj * f1, lj2 * f + 2 * lj1 * f1 + lj * f2


class Crystal(NamedTuple):
    positions: torch.Tensor  # (N, 3) Å, float64
    cell: torch.Tensor  # (3, 3) Å, float64, rows are lattice vectors


def fcc(lattice_constant: float) -> Crystal:
    """The conventional cubic cell, 4 atoms; four times the primitive one, so its Gamma holds X as well."""
    cell = lattice_constant * torch.eye(3, dtype=torch.float64, device="cpu")
    fractions = [[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]
    return Crystal(torch.tensor(fractions, dtype=torch.float64, device="cpu") @ cell, cell)


def hcp(a: float, c: float) -> Crystal:
    """The primitive hexagonal cell, 2 atoms, neither of them an inversion centre."""
    cell = torch.tensor(
        [[a, 0.0, 0.0], [a / 2, a * math.sqrt(3) / 2, 0.0], [0.0, 0.0, c]], dtype=torch.float64, device="cpu"
    )
    fractions = torch.tensor([[0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 2]], dtype=torch.float64, device="cpu")
    return Crystal(fractions @ cell, cell)


# ---- through the layer ----


def deform(crystal: Crystal, x: torch.Tensor) -> Crystal:
    """The crystal after x (6 + 3N): six Voigt strains, then N displacements in Å."""
    strain = torch.einsum("s,sab->ab", x[:6], torch.from_numpy(VOIGT_STRAINS))
    gradient = torch.eye(3, dtype=x.dtype, device=x.device) + strain
    return Crystal(crystal.positions @ gradient + x[6:].reshape(-1, 3), crystal.cell @ gradient)


def energy(crystal: Crystal, potential: LennardJones) -> torch.Tensor:
    """Energy of the cell, eV, ()."""
    pairs = diffnl.NeighborList(potential.cutoff)(crystal.positions, crystal.cell, True)
    return 0.5 * potential.energy(pairs.distances).sum()


def gradient_and_hessian(crystal: Crystal, potential: LennardJones) -> tuple[torch.Tensor, torch.Tensor]:
    """dE/dx (6 + 3N,) and d2E/dx2 (6 + 3N, 6 + 3N) at x = 0, in eV and Å."""

    def energy_of(x):
        return energy(deform(crystal, x), potential)

    x = torch.zeros(6 + crystal.positions.numel(), dtype=torch.float64, device="cpu")
    return torch.func.grad(energy_of)(x), torch.func.hessian(energy_of)(x)


def relax(crystal: Crystal, potential: LennardJones, max_steps: int = 50) -> Crystal:
    """The stress-free and force-free crystal near `crystal`, by Newton's method on strain and displacements.

    Raises RuntimeError if it does not converge to a minimum.
    """
    for _ in range(max_steps):
        gradient, hessian = gradient_and_hessian(crystal, potential)
        step = -torch.linalg.pinv(hessian, rtol=1e-9, hermitian=True) @ gradient
        size = max(step[:6].abs().max().item(), step[6:].abs().max().item() / potential.sigma)
        crystal = deform(crystal, step * min(1.0, 0.03 / size) if size > 0 else step)
        if size < 1e-13:
            curvatures = torch.linalg.eigvalsh(hessian)
            if curvatures[0] < -1e-9 * curvatures[-1]:
                raise RuntimeError("the stress-free crystal is no minimum of the energy; try a larger cutoff")
            return crystal
    raise RuntimeError(f"no stress-free crystal after {max_steps} Newton steps; try a larger cutoff")


class Moduli(NamedTuple):
    clamped: np.ndarray  # (6, 6) eV/Å^3, atoms held at their fractional positions
    relaxed: np.ndarray  # (6, 6) eV/Å^3
    omega2: np.ndarray  # (3N,) ascending eigenvalues of the dynamical matrix at Gamma, eV/(Å^2 u)


def moduli(crystal: Crystal, potential: LennardJones) -> Moduli:
    """Elastic constants and Gamma phonons of a stress-free crystal, from one Hessian through the layer."""
    _, hessian = gradient_and_hessian(crystal, potential)
    strain_strain, strain_u, u_u = hessian[:6, :6], hessian[:6, 6:], hessian[6:, 6:]
    relaxation = strain_u @ torch.linalg.pinv(u_u, rtol=1e-9, hermitian=True) @ strain_u.T
    volume = torch.linalg.det(crystal.cell).abs()
    omega2 = torch.linalg.eigvalsh(u_u / potential.mass)
    clamped, relaxed = strain_strain / volume, (strain_strain - relaxation) / volume
    return Moduli(clamped.numpy(), relaxed.numpy(), omega2.numpy())


def largest_stress(crystal: Crystal, potential: LennardJones) -> float:
    """Largest component of the stress, eV/Å^3."""
    crystal = Crystal(*(tensor.clone().requires_grad_() for tensor in crystal))
    _, stress = diffnl.forces_and_stress(energy(crystal, potential), *crystal)
    return stress.abs().max().item()


# ---- independent values: numpy, closed-form lattice sums ----


def lattice_vectors(cell: np.ndarray, start: np.ndarray, cutoff: float) -> np.ndarray:
    """All vectors start + S @ cell (M, 3) shorter than `cutoff` and not zero."""
    # The planes of axis k lie 1/|column k of the inverse| apart, so this many of them are within reach.
    per_length = np.linalg.norm(np.linalg.inv(cell), axis=0)
    reach = np.ceil((cutoff + np.linalg.norm(start)) * per_length).astype(int)
    axes = (np.arange(-n, n + 1) for n in reach)
    vectors = start + np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3) @ cell
    lengths = np.linalg.norm(vectors, axis=1)
    return vectors[(lengths > 1e-6 * cutoff) & (lengths < cutoff)]


class Sums:
    """Sums over a set of pair vectors v (M, 3): `b` = phi'/r, `a` = (phi'' - phi'/r)/r^2."""

    def __init__(self, vectors: np.ndarray, potential: LennardJones):
        r = np.linalg.norm(vectors, axis=1)
        first, second = potential.slopes(r)
        self.v, self.b, self.a = vectors, first / r, (second - first / r) / r**2

    def stiffness(self, weight=1.0) -> np.ndarray:
        """sum w grad grad phi = sum w (a v_a v_b + b delta_ab), (3, 3) eV/Å^2."""
        return np.einsum("p,pa,pb->ab", weight * self.a, self.v, self.v) + np.eye(3) * np.sum(weight * self.b)

    def bracket(self) -> np.ndarray:
        """sum a v_a v_b v_c v_d in Voigt notation, (6, 6) eV."""
        products = np.stack([self.v[:, a] * self.v[:, b] for a, b in VOIGT], axis=1)
        return np.einsum("p,ps,pt->st", self.a, products, products)

    def coupling(self) -> np.ndarray:
        """sum a v_a v_b v_c, (6, 3) eV/Å: strain against displacement."""
        products = np.stack([self.v[:, a] * self.v[:, b] for a, b in VOIGT], axis=1)
        return np.einsum("p,ps,pc->sc", self.a, products, self.v)


def fcc_vectors(a: float, potential: LennardJones) -> np.ndarray:
    primitive = a / 2 * np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    return lattice_vectors(primitive, np.zeros(3), potential.cutoff)


def hcp_vectors(a: float, c: float, potential: LennardJones) -> tuple[np.ndarray, np.ndarray]:
    """Pair vectors from an atom to those of its own sublattice and to those of the other one."""
    cell = np.array([[a, 0.0, 0.0], [a / 2, a * math.sqrt(3) / 2, 0.0], [0.0, 0.0, c]])
    other = np.array([a / 2, a / math.sqrt(12), c / 2])
    same = lattice_vectors(cell, np.zeros(3), potential.cutoff)
    return same, lattice_vectors(cell, other, potential.cutoff)


def newton(step_of, x: np.ndarray, max_steps: int = 100) -> np.ndarray:
    """Scale the lattice parameters x by exp(step_of(x)) until nothing changes."""
    for _ in range(max_steps):
        step = step_of(x)
        x = x * np.exp(np.clip(step, -0.03, 0.03))
        if np.abs(step).max() < 1e-14:
            return x
    return x  # the comparison tells


def expected_fcc(potential: LennardJones) -> tuple[np.ndarray, Moduli]:
    """Lattice constant (1,) Å and moduli by lattice sums over one atom.

    Zero stress: sum r phi' = 0. C_abcd = 1/(2 V) sum a v_a v_b v_c v_d with V = a^3/4 (Born-Huang, no
    internal part). Gamma of the cubic cell holds Gamma and the three points X = 2 pi/a (1, 0, 0) of the
    primitive cell, where D(q) = 1/m sum (1 - cos q.v) grad grad phi.
    """

    def step_of(x):
        vectors = fcc_vectors(x[0], potential)
        r = np.linalg.norm(vectors, axis=1)
        first, second = potential.slopes(r)
        return np.array([-np.sum(r * first) / np.sum(r**2 * second + r * first)])

    lattice = newton(step_of, np.array([1.54 * potential.sigma]))
    sums = Sums(fcc_vectors(lattice[0], potential), potential)
    elastic = sums.bracket() / (2 * lattice[0] ** 3 / 4)
    weight = 1 - np.cos(2 * np.pi / lattice[0] * sums.v[:, 0])
    modes_at_x = np.linalg.eigvalsh(sums.stiffness(weight) / potential.mass)
    return lattice, Moduli(elastic, elastic, np.sort(np.concatenate([np.zeros(3), np.tile(modes_at_x, 3)])))


def expected_hcp(potential: LennardJones) -> tuple[np.ndarray, Moduli]:
    """Lattice constants a, c (2,) Å and moduli by lattice sums over the two sublattices.

    With w the displacement of one sublattice against the other, E_ww = sum_other grad grad phi and, no force
    acting on an atom, E_ew = sum_other a v_a v_b v_c. The optical modes are omega^2 = 2 E_ww / m.
    """

    def step_of(x):
        sums = Sums(np.concatenate(hcp_vectors(*x, potential)), potential)
        # d/d(ln a) scales x^2 + y^2, d/d(ln c) scales z^2.
        parts = np.stack([sums.v[:, 0] ** 2 + sums.v[:, 1] ** 2, sums.v[:, 2] ** 2])
        jacobian = (parts * sums.a) @ parts.T + 2 * np.diag(parts @ sums.b)
        return -np.linalg.solve(jacobian, parts @ sums.b)

    lattice = newton(step_of, np.array([1.09, 1.09 * math.sqrt(8 / 3)]) * potential.sigma)
    same, other = (Sums(vectors, potential) for vectors in hcp_vectors(*lattice, potential))
    volume = lattice[0] ** 2 * math.sqrt(3) / 2 * lattice[1]
    clamped = (same.bracket() + other.bracket()) / volume
    relaxation = other.coupling() @ np.linalg.solve(other.stiffness(), other.coupling().T) / volume
    optical = np.linalg.eigvalsh(2 * other.stiffness() / potential.mass)
    return lattice, Moduli(clamped, clamped - relaxation, np.sort(np.concatenate([np.zeros(3), optical])))


# ---- the comparison ----


class Row(NamedTuple):
    name: str
    layer: float
    expected: float
    scale: float  # what the difference is measured against: |expected|, or a related value where that is zero

    @property
    def error(self) -> float:
        return abs(self.layer - self.expected) / self.scale


def elastic_rows(names: str, label: str, unit: str, layer: np.ndarray, expected: np.ndarray) -> list[Row]:
    rows = []
    for name in names.split():
        s, t = int(name[1]) - 1, int(name[2]) - 1
        value = expected[s, t] * GPA
        rows.append(Row(f"{name} {label}{unit}", layer[s, t] * GPA, value, abs(value)))
    difference = np.abs(layer - expected).max() / np.abs(expected).max()
    return [*rows, Row(f"all 36 {label}(largest difference / C_max)", difference, 0.0, 1.0)]


def phonon_rows(names: list[str], layer: np.ndarray, expected: np.ndarray) -> list[Row]:
    """One row a mode, as frequencies in THz; the error is that of omega^2, twice that of the frequency."""
    zero = np.abs(layer[:3]).max() / expected[-1]
    rows = [Row("acoustic modes (largest |omega^2| / omega_max^2)", zero, 0.0, 1.0)]
    for name, value, reference in zip(names, layer[3:], expected[3:], strict=True):
        rows.append(Row(f"{name} (THz)", *(THZ * math.sqrt(max(w, 0.0)) for w in (value, reference)), 0.0))
        # omega^2 is the eigenvalue, so it is what the tolerance is about.
        rows[-1] = rows[-1]._replace(scale=THZ * math.sqrt(reference) / 2)
    return rows


def compare_fcc(potential: LennardJones) -> list[Row]:
    crystal = relax(fcc(1.54 * potential.sigma), potential)
    found = moduli(crystal, potential)
    lattice, expected = expected_fcc(potential)
    c11, c12, c44 = expected.relaxed[0, 0], found.relaxed[0, 1], found.relaxed[3, 3]
    modes = [f"X transverse {n}" for n in range(1, 7)] + [f"X longitudinal {n}" for n in range(1, 4)]
    return [
        Row("lattice constant a (Å)", crystal.cell[0, 0].item(), lattice[0], lattice[0]),
        Row("residual stress / C11", largest_stress(crystal, potential) / c11, 0.0, 1.0),
        *elastic_rows("C11 C12 C44", "", "(GPa)", found.relaxed, expected.relaxed),
        Row("Cauchy relation, (C12 - C44) / C11", (c12 - c44) / c11, 0.0, 1.0),
        Row("internal relaxation / C11", np.abs(found.clamped - found.relaxed).max() / c11, 0.0, 1.0),
        *phonon_rows(modes, found.omega2, expected.omega2),
    ]


def compare_hcp(potential: LennardJones) -> list[Row]:
    crystal = relax(hcp(1.09 * potential.sigma, 1.09 * math.sqrt(8 / 3) * potential.sigma), potential)
    found = moduli(crystal, potential)
    lattice, expected = expected_hcp(potential)
    names = "C11 C12 C13 C33 C44 C66"
    return [
        Row("lattice constant a (Å)", crystal.cell[0, 0].item(), lattice[0], lattice[0]),
        Row("lattice constant c (Å)", crystal.cell[2, 2].item(), lattice[1], lattice[1]),
        Row("residual stress / C11", largest_stress(crystal, potential) / expected.relaxed[0, 0], 0.0, 1.0),
        *elastic_rows(names, "clamped ", "(GPa)", found.clamped, expected.clamped),
        *elastic_rows(names, "relaxed ", "(GPa)", found.relaxed, expected.relaxed),
        *phonon_rows(["optical 1", "optical 2", "optical 3"], found.omega2, expected.omega2),
    ]


def print_table(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n{'':<48}{'diffnl':>20}{'lattice sums':>20}{'rel. diff.':>12}")
    for row in rows:
        number = "20.3e" if row.expected == 0 else "20.12f"
        flag = "" if row.error <= TOLERANCE else "  <-- differs"
        print(f"{row.name:<48}{row.layer:{number}}{row.expected:{number}}{row.error:>12.1e}{flag}")


def parse(argv: list[str] | None) -> LennardJones:
    parser = argparse.ArgumentParser(
        description="Elastic constants and Gamma phonons of Lennard-Jones fcc and hcp, against lattice sums."
    )
    for name, default, meaning in (
        ("--epsilon", 0.01032, "well depth, eV (default: argon, %(default)s)"),
        ("--sigma", 3.405, "diameter, Å (default: argon, %(default)s)"),
        ("--cutoff", 3.0, "in units of sigma, at least 1.5 (default: %(default)s)"),
        ("--mass", 39.948, "atomic mass, u (default: argon, %(default)s)"),
    ):
        parser.add_argument(name, type=float, default=default, help=meaning)
    args = parser.parse_args(argv)
    for name in ("epsilon", "sigma", "cutoff", "mass"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            parser.error(f"--{name} must be positive and finite, got {value}")
    if args.cutoff < 1.5:
        # The first shell lies at 1.1 sigma and must be inside the onset of the switch.
        parser.error(f"--cutoff must be at least 1.5 (in units of sigma), got {args.cutoff}")
    return LennardJones(args.epsilon, args.sigma, args.cutoff * args.sigma, args.mass)


def main(argv: list[str] | None = None) -> int:
    potential = parse(argv)
    failed = []
    for name, compare in (("fcc, 4-atom cubic cell", compare_fcc), ("hcp, 2-atom cell", compare_hcp)):
        try:
            rows = compare(potential)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print_table(f"Lennard-Jones {name}, zero stress", rows)
        # Written so that a NaN fails.
        failed += [f"{name}: {row.name}" for row in rows if not row.error <= TOLERANCE]
    if failed:
        print(
            f"\n{len(failed)} values differ by more than {TOLERANCE}:", *failed, sep="\n  ", file=sys.stderr
        )
        return 1
    print(f"\nall values agree within {TOLERANCE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
