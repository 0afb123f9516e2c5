"""The ASE adapter against `ase.neighborlist`, ASE's own calculators and drivers, and ASE's own tests."""

import inspect
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import ase.neighborlist
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from recipes import run_recipe
from structures import CRYSTALS, OPEN, STRUCTURES, canonical, random_box

import diffnl
from diffnl.adapters.ase import DiffnlCalculator, neighbor_list, primitive_neighbor_list
from diffnl.testing import check_potential

ADAPTER = "ASE"
PACKAGES = ("ase",)

EVERY = STRUCTURES | {"random_box": random_box()}
DTYPES = {"i": np.int64, "j": np.int64, "d": np.float64, "D": np.float64, "S": np.int64}


def assert_same_list(ours, theirs):
    """Two results for the quantities "ijSdD"."""
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.shape[1:]) == (its.dtype, its.shape[1:])
    assert (np.diff(ours[0]) >= 0).all()
    ours, theirs = canonical(*ours), canonical(*theirs)
    for mine, its in zip(ours[:3], theirs[:3], strict=True):
        assert np.array_equal(mine, its)
    for mine, its in zip(ours[3:], theirs[3:], strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=1e-13)


def by_symbols(atoms):
    """Cutoffs by symbols, and by numbers for the first element with itself; the last two have none."""
    symbols = sorted(set(atoms.get_chemical_symbols()))
    pairs = [(a, b) for a in symbols for b in symbols if a < b][:-1]
    cutoffs = {pair: 2.5 + 0.7 * n for n, pair in enumerate(pairs)}
    return cutoffs | {(int(atoms.numbers[0]),) * 2: 4.2, (92, "Pu"): 5.0}


CUTOFFS = {
    "short": lambda atoms: 2.0,
    "long": lambda atoms: 6.5,
    "numpy": lambda atoms: np.float64(4.0),
    "dict": by_symbols,
    "radii": lambda atoms: ase.neighborlist.natural_cutoffs(atoms, mult=1.3),
    "unequal": lambda atoms: np.linspace(0.0, 2.5, len(atoms)),
}


@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("form", CUTOFFS)
@pytest.mark.parametrize("name", EVERY)
def test_same_list(name, form, self_interaction):
    atoms = EVERY[name]
    arguments = "ijSdD", atoms, CUTOFFS[form](atoms), self_interaction
    assert_same_list(neighbor_list(*arguments), ase.neighborlist.neighbor_list(*arguments))


@pytest.mark.parametrize("ours", [neighbor_list, primitive_neighbor_list], ids=lambda f: f.__name__)
def test_same_signature(ours):
    assert inspect.signature(ours) == inspect.signature(getattr(ase.neighborlist, ours.__name__))


@pytest.mark.parametrize("quantities", ["ijdDS", "SDdji", "jDidS", "jj", *"ijdDS"])
def test_quantities_in_any_order(quantities):
    atoms = CRYSTALS["salt"]
    reference = dict(zip("ijdDS", neighbor_list("ijdDS", atoms, 4.0), strict=True))
    found = neighbor_list(quantities, atoms, 4.0)
    if len(quantities) == 1:
        assert isinstance(found, np.ndarray)
        found = (found,)
    assert isinstance(found, tuple)
    for name, array in zip(quantities, found, strict=True):
        assert array.dtype == DTYPES[name]
        assert np.array_equal(array, reference[name])


@pytest.mark.parametrize(
    ("cell", "cutoff"),
    [(np.eye(3), c) for c in (1.0, math.sqrt(2), math.sqrt(3), 2.0, 3.0)] + [(0.1 * np.eye(3), 0.3)],
)
def test_strict_as_ase_at_the_cutoff(cell, cutoff):
    atoms = Atoms("H", cell=cell, pbc=True)
    arguments = "ijSdD", atoms, cutoff
    theirs = ase.neighborlist.neighbor_list(*arguments)
    assert_same_list(neighbor_list(*arguments), theirs)
    assert (theirs[3] < cutoff).all()


def test_self_comes_first_in_its_row():
    i, j, S = neighbor_list("ijS", CRYSTALS["salt"], 4.0, self_interaction=True)
    starts = np.flatnonzero(np.diff(i, prepend=-1))
    assert np.array_equal(i[starts], np.arange(8))
    assert np.array_equal(j[starts], np.arange(8))
    assert not S[starts].any()


@pytest.mark.parametrize("cutoff", [0.0, -1.0, {("Na", "Cl"): 0.0}, np.zeros(8)], ids=str)
@pytest.mark.parametrize("self_interaction", [False, True])
def test_no_cutoff_no_pairs(cutoff, self_interaction):
    arguments = "ijSdD", CRYSTALS["salt"], cutoff, self_interaction
    assert_same_list(neighbor_list(*arguments), ase.neighborlist.neighbor_list(*arguments))
    assert len(neighbor_list("i", *arguments[1:])) == 0


def test_coincident_atoms():
    atoms = Atoms("H2", positions=np.ones((2, 3)))
    arguments = "ijSdD", atoms, 1e-4
    assert_same_list(neighbor_list(*arguments), ase.neighborlist.neighbor_list(*arguments))
    assert len(neighbor_list("i", *arguments[1:])) == 2


@pytest.mark.parametrize("cutoff", [3.0, {("H", "H"): 1.0}, []], ids=str)
@pytest.mark.parametrize("self_interaction", [False, True])
def test_no_atoms(cutoff, self_interaction):
    arguments = "ijSdD", Atoms(pbc=True, cell=np.eye(3)), cutoff, self_interaction
    assert_same_list(neighbor_list(*arguments), ase.neighborlist.neighbor_list(*arguments))


def test_periodic_axis_without_a_vector_has_length_one_as_in_ase():
    atoms = Atoms("H2", [[0, 0, 0], [0.3, 0.4, 2.0]], cell=[4.0, 4.0, 0.0], pbc=True)
    arguments = "ijSdD", atoms, 3.0
    assert_same_list(neighbor_list(*arguments), ase.neighborlist.neighbor_list(*arguments))


@pytest.mark.parametrize("name", CRYSTALS)
def test_scaled_positions(name):
    atoms = CRYSTALS[name]
    arguments = "ijSdD", atoms.pbc, atoms.cell, atoms.get_scaled_positions(wrap=False), 5.0
    theirs = ase.neighborlist.primitive_neighbor_list(*arguments, use_scaled_positions=True)
    assert_same_list(primitive_neighbor_list(*arguments, use_scaled_positions=True), theirs)


def test_dict_needs_numbers():
    atoms = CRYSTALS["salt"]
    arguments = "ij", atoms.pbc, atoms.cell, atoms.positions, {("Na", "Cl"): 3.0, ("Na", "Na"): 4.5}
    with pytest.raises(TypeError):
        ase.neighborlist.primitive_neighbor_list(*arguments)
    with pytest.raises(TypeError, match="`numbers`"):
        primitive_neighbor_list(*arguments)


def test_later_entries_of_a_dict_win():
    atoms = CRYSTALS["salt"]
    cutoff = {("Na", "Cl"): 3.0, (17, 11): 5.0, ("Cl", 17): 4.0, (17, 17): 2.0}
    arguments = "ijSdD", atoms, cutoff
    assert_same_list(neighbor_list(*arguments), ase.neighborlist.neighbor_list(*arguments))


def test_unknown_quantity():
    with pytest.raises(ValueError):
        ase.neighborlist.neighbor_list("ix", CRYSTALS["salt"], 3.0)
    with pytest.raises(ValueError, match=r"`quantities` .* got \['x'\]"):
        neighbor_list("ix", CRYSTALS["salt"], 3.0)


@pytest.mark.parametrize("cutoff", [math.nan, math.inf, [math.nan] * 8])
def test_cutoffs_that_are_not_finite(cutoff):
    with pytest.raises(ValueError, match="`cutoff`"):
        neighbor_list("ij", CRYSTALS["salt"], cutoff)


def test_singular_periodic_cell():
    with pytest.raises(ValueError, match="`cell`"):
        primitive_neighbor_list("ij", [True] * 3, np.diag([3.0, 3.0, 0.0]), np.zeros((1, 3)), 2.0)


@pytest.mark.parametrize("name", ["silicon_sheared", "magnesium", "slab_with_oxygen", "ethanol"])
def test_morse_potential_on_our_list(name):
    ours, theirs = STRUCTURES[name].copy(), STRUCTURES[name].copy()
    settings = {"r0": 2.2, "epsilon": 0.4, "rho0": 5.0}
    ours.calc = MorsePotential(neighbor_list=neighbor_list, **settings)
    theirs.calc = MorsePotential(**settings)
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), rtol=1e-10, atol=1e-10)
    if ours.cell.rank == 3:
        np.testing.assert_allclose(ours.get_stress(), theirs.get_stress(), rtol=1e-10, atol=1e-12)


PLUGIN = """
import ase.neighborlist
import diffnl.adapters.ase as ours

calls = dict.fromkeys(("neighbor_list", "primitive_neighbor_list"), 0)

def counted(name):
    def call(*args, **kwargs):
        calls[name] += 1
        return getattr(ours, name)(*args, **kwargs)
    return call

for name in calls:
    setattr(ase.neighborlist, name, counted(name))

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"ours: {calls}")
"""
THEIR_TESTS = {
    "ase.test.neighbor": 34,
    "ase.test.calculator.test_morse": 5,
    "ase.test.precon.test_precon_assembly": 36,
    "ase.test.test_cluster": 24,
}


def test_their_tests_on_our_list(tmp_path):
    """ASE's own tests of neighbour lists and of code that uses them, with its two functions replaced."""
    (tmp_path / "our_list.py").write_text(PLUGIN)
    root = Path(diffnl.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "our_list", "--pyargs", *THEIR_TESTS]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (passed,) = re.findall(r"(\d+) passed", run.stdout)
    assert int(passed) >= sum(THEIR_TESTS.values())
    assert not re.search(r"failed|skipped|deselected", run.stdout.splitlines()[-1])
    calls = re.findall(r"'(?:primitive_)?neighbor_list': (\d+)", run.stdout)
    assert [int(number) >= 20 for number in calls] == [True, True], calls


# The calculator.

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
    with torch.no_grad():
        forces = atoms.get_forces()
    np.testing.assert_allclose(forces, theirs_on(atoms).get_forces(), rtol=0, atol=1e-9)


def test_is_a_calculator_of_ase_and_survives_a_pickle():
    atoms = with_calculator(STRUCTURES["salt"], Coulomb(), ("numbers",), directory="somewhere")
    assert isinstance(atoms.calc, Calculator)
    assert atoms.calc.directory == "somewhere"
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


def test_imports_nothing_of_ase():
    """Neither the adapter nor its list needs ASE; only a dict of cutoffs and the calculator do."""
    code = (
        "import sys; import numpy as np; from diffnl.adapters.ase import primitive_neighbor_list as f\n"
        "assert len(f('i', [True] * 3, np.eye(3), np.zeros((1, 3)), 1.5)) == 18\n"
        "assert 'ase' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipe():
    names = run_recipe("ASE")
    atoms = names["atoms"]
    assert isinstance(atoms.calc, DiffnlCalculator)
    assert np.array_equal(names["i"], neighbor_list("i", atoms, 4.0))
    assert np.abs(atoms.get_stress()).max() < 1e-3
