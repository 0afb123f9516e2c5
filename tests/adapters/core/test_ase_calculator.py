"""The calculator of the ASE adapter against ASE's own calculators, and in its drivers."""

import pickle

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.lj import LennardJones
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from recipes import run_recipe
from structures import OPEN, STRUCTURES

import diffnl
from diffnl.adapters.ase import DiffnlCalculator, neighbor_list
from diffnl.testing import check_potential

ADAPTER = "ASE, calculator"
PACKAGES = ("ase",)

SIGMA, EPSILON, CUTOFF, ONSET = 2.3, 0.35, 6.0, 4.5


def lennard_jones(positions, cell, pbc):
    """The energy of `LennardJones(smooth=True)`."""
    squares = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF).vectors.square().sum(1)
    sixth = (SIGMA**2 / squares) ** 3
    rest = CUTOFF**2 - squares
    switch = rest**2 * (CUTOFF**2 + 2 * squares - 3 * ONSET**2) / (CUTOFF**2 - ONSET**2) ** 3
    return 2 * EPSILON * (torch.where(squares < ONSET**2, 1.0, switch) * (sixth**2 - sixth)).sum()


class Coulomb(torch.nn.Module):
    """Screened charges: of the elements, and of the atoms."""

    def __init__(self):
        super().__init__()
        self.neighbors = diffnl.NeighborList(5.0, full=False)
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.calls = 0

    def forward(self, positions, cell, pbc, numbers, *charges):
        self.calls += 1
        pairs = self.neighbors(positions, cell, pbc)
        charge = torch.where(numbers == 8, -1.0, 1.0).to(positions)
        for extra in charges:
            charge = charge + extra
        i, j = pairs.mapping
        envelope = (1 - (pairs.distances / 5.0) ** 2) ** 3
        return self.scale * (charge[i] * charge[j] * envelope / pairs.distances).sum()


def with_calculator(atoms, *args, **kwargs):
    atoms = atoms.copy()
    atoms.calc = DiffnlCalculator(*args, **kwargs)
    return atoms


def theirs_on(atoms):
    atoms = atoms.copy()
    atoms.calc = LennardJones(sigma=SIGMA, epsilon=EPSILON, rc=CUTOFF, ro=ONSET, smooth=True)
    return atoms


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_as_lennard_jones_of_ase(name, dtype, tolerance):
    ours, theirs = with_calculator(STRUCTURES[name], lennard_jones, dtype=dtype), theirs_on(STRUCTURES[name])
    forces, scale = theirs.get_forces(), max(1.0, np.abs(theirs.get_forces()).max())
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), rel=tolerance)
    assert ours.get_potential_energy(force_consistent=True) == ours.get_potential_energy()
    assert ours.get_forces().dtype == np.float64
    np.testing.assert_allclose(ours.get_forces(), forces, rtol=0, atol=tolerance * scale)
    if ours.cell.rank == 3:
        assert ours.get_stress().shape == (6,)
        np.testing.assert_allclose(ours.get_stress(), theirs.get_stress(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["silicon_sheared", "slab_with_oxygen", "iron_left_handed"])
def test_forces_and_stress_are_those_of_the_energy(name):
    atoms = with_calculator(STRUCTURES[name], lennard_jones)
    scale = np.abs(atoms.get_forces()).max()
    numeric = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[0, 1])
    np.testing.assert_allclose(atoms.get_forces()[:2], numeric, rtol=0, atol=1e-5 * scale)
    numeric = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), numeric, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["wire", "ethanol", "one_atom"])
def test_no_stress_without_a_volume(name):
    atoms = with_calculator(OPEN[name], lennard_jones)
    assert np.isfinite(atoms.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, True)], ids=str)
def test_there_is_a_stress_where_an_axis_is_periodic(pbc):
    atoms = STRUCTURES["silicon_sheared"].copy()
    atoms.pbc = pbc
    atoms = with_calculator(atoms, lennard_jones)
    numeric = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), numeric, rtol=0, atol=1e-6 * np.abs(numeric).max())


def test_a_molecule_in_a_box_has_no_stress():
    """The rank of its cell is 3: ASE's calculators divide the virial by the volume of the box."""
    atoms = OPEN["ethanol"].copy()
    atoms.center(vacuum=3.0)
    assert atoms.cell.rank == 3 and not atoms.pbc.any()
    assert np.abs(theirs_on(atoms).get_stress()).max() > 1e-3
    atoms = with_calculator(atoms, lennard_jones)
    np.testing.assert_allclose(atoms.get_forces(), theirs_on(atoms).get_forces(), rtol=0, atol=1e-8)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


@pytest.mark.parametrize("angles", [(0, 0, 0), (10, 20, 30), (71, -37, 13), (180, 45, 90)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_stress_where_the_rows_of_the_cell_lie_in_a_plane(dtype, angles):
    """Its rank in ASE is the number of rows that are not zero. Rotated, the volume is one of rounding."""
    atoms = Atoms("Cu2", [[0, 0, 0], [1.5, 1.0, 2.0]], cell=[[4, 0, 0], [0, 4, 0], [4, 4, 0]], pbc=(1, 1, 0))
    for angle, axis in zip(angles, "xyz", strict=True):
        atoms.rotate(angle, axis, rotate_cell=True)
    assert atoms.cell.rank == 3
    atoms = with_calculator(atoms, lennard_jones, dtype=dtype)
    assert np.isfinite(atoms.get_forces()).all() and "stress" not in atoms.calc.results
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_a_volume_that_float32_does_not_tell_from_rounding():
    atoms = Atoms("Cu", cell=[[4, 0, 0], [0, 4, 0], [4, 4, 1e-6]], pbc=(1, 1, 0))
    with_calculator(atoms, lennard_jones).get_stress()
    with pytest.raises(PropertyNotImplementedError):
        with_calculator(atoms, lennard_jones, dtype=torch.float32).get_stress()


class Perceptron(torch.nn.Module):
    """Energies of pairs by a matrix product, which autocast would round to bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))

    def forward(self, positions, cell, pbc):
        distances = diffnl.neighbor_pairs(positions, cell, pbc, 4.0).distances.unsqueeze(1)
        basis = torch.sin(torch.arange(1, 9) * distances) * (4.0 - distances) ** 3
        return self.layers(basis).sum()


def test_same_bits_under_autocast():
    expected = with_calculator(STRUCTURES["silicon_sheared"], Perceptron(), dtype=torch.float32)
    found = with_calculator(STRUCTURES["silicon_sheared"], Perceptron(), dtype=torch.float32)
    expected.get_potential_energy()
    with torch.autocast("cpu", torch.bfloat16):
        found.get_potential_energy()
    assert np.abs(expected.get_forces()).max() > 0.1
    for name in ("energy", "forces", "stress"):
        assert np.array_equal(found.calc.results[name], expected.calc.results[name])


def test_a_potential_may_switch_autocast_on():
    seen = []

    def energy(positions, cell, pbc):
        with torch.autocast("cpu", torch.bfloat16):
            seen.append((positions @ positions.mT).dtype)
        return positions.square().sum()

    with_calculator(OPEN["ethanol"], energy, dtype=torch.float32).get_forces()
    assert seen == [torch.bfloat16]


def test_writes_to_no_array_of_the_atoms():
    atoms = with_calculator(STRUCTURES["slab_with_oxygen"], lennard_jones)
    arrays = [atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc]
    before = [array.copy() for array in arrays]
    atoms.get_forces(), atoms.get_stress(), neighbor_list("ijdDS", atoms, 4.0)
    for array, was in zip(arrays, before, strict=True):
        assert np.array_equal(array, was)


def test_molecule_has_no_cell_and_no_pbc():
    seen = []

    def energy(positions, cell, pbc):
        seen.append((cell, pbc.tolist()))
        return positions.square().sum()

    with_calculator(OPEN["ethanol"], energy).get_potential_energy()
    assert seen == [(None, [False] * 3)]


def test_arrays_of_atoms_reach_the_potential():
    atoms = STRUCTURES["oxide_anywhere"].copy()
    model, charges = Coulomb(), np.linspace(-0.3, 0.3, len(atoms))
    atoms.set_array("partial", charges)
    atoms = with_calculator(atoms, model, ("numbers", "partial"))
    inputs = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array), torch.tensor(atoms.pbc)
    per_atom = torch.tensor(atoms.numbers), torch.tensor(charges)
    assert atoms.get_potential_energy() == model(*inputs, *per_atom).item()
    assert model.scale.grad is None
    # The same function and arguments for the checks of potentials.
    report = check_potential(model, *inputs, per_atom, cutoff=5.0)
    assert report, str(report)


def test_results_stand_until_the_atoms_change():
    model = Coulomb()
    atoms = STRUCTURES["salt"].copy()
    atoms.set_array("partial", np.zeros(len(atoms)))
    atoms = with_calculator(atoms, model, ("numbers", "partial"))
    before = atoms.get_potential_energy()
    atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energy()
    assert model.calls == 1
    atoms.arrays["partial"][0] = 0.5
    assert atoms.get_potential_energy() != before
    assert model.calls == 2
    atoms.positions[0, 0] += 0.1
    atoms.get_forces()
    atoms.set_cell(1.01 * atoms.cell)
    atoms.get_stress()
    atoms.numbers[0] = 8
    atoms.get_stress()
    atoms.pbc = [True, True, False]
    atoms.get_forces()
    assert model.calls == 6
    atoms.get_forces(), atoms.get_potential_energy()
    assert model.calls == 6
    atoms.calc.reset()
    atoms.get_forces()
    assert model.calls == 7


def test_works_where_gradients_are_switched_off():
    atoms = with_calculator(STRUCTURES["salt"], lennard_jones)
    for off in (torch.no_grad, torch.inference_mode):
        atoms.calc.reset()
        with off():
            forces = atoms.get_forces()
    np.testing.assert_allclose(forces, theirs_on(atoms).get_forces(), rtol=0, atol=1e-9)


def test_is_a_calculator_of_ase_and_survives_a_pickle(tmp_path):
    atoms = with_calculator(STRUCTURES["salt"], Coulomb(), ("numbers",), directory=tmp_path / "runs")
    assert isinstance(atoms.calc, Calculator)
    assert atoms.calc.directory == str(tmp_path / "runs")
    assert atoms.calc.implemented_properties == ["energy", "free_energy", "forces", "stress"]
    copy = atoms.copy()
    copy.calc = pickle.loads(pickle.dumps(atoms.calc))
    assert type(copy.calc) is DiffnlCalculator
    assert np.array_equal(copy.get_forces(), atoms.get_forces())


def test_relaxes_to_the_same_crystal():
    """Positions and cell of a rattled, strained crystal, which end at one lattice constant."""
    ends = []
    for start in (with_calculator(bulk("Cu", cubic=True), lennard_jones), theirs_on(bulk("Cu", cubic=True))):
        start.rattle(0.05, seed=1)
        start.set_cell(start.cell.array @ (np.eye(3) + np.diag([0.03, -0.02, 0.01])), scale_atoms=True)
        with BFGS(FrechetCellFilter(start), logfile=None) as relaxation:
            assert relaxation.run(fmax=1e-3, steps=100)
        ends.append(start)
    ours, theirs = ends
    assert ours.get_volume() == pytest.approx(theirs.get_volume(), rel=1e-6)
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=1e-7)
    assert np.abs(ours.get_stress()).max() < 1e-3


def test_molecular_dynamics_conserves_energy():
    atoms = with_calculator(bulk("Cu", cubic=True, a=3.6) * 2, lennard_jones)
    atoms.rattle(0.05, seed=2)
    atoms.set_velocities(0.02 * np.random.default_rng(0).standard_normal((len(atoms), 3)))
    energies, kinetic = [], []
    dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.attach(lambda: kinetic.append(atoms.get_kinetic_energy()))
    dynamics.run(100)
    assert np.ptp(energies) < 1e-2 * np.ptp(kinetic)


def test_recipe():
    names = run_recipe("ASE")
    atoms = names["atoms"]
    assert isinstance(atoms.calc, DiffnlCalculator)
    assert np.array_equal(names["i"], neighbor_list("i", atoms, 4.0))
    assert np.abs(atoms.get_stress()).max() < 1e-3
