"""The lists of the ASE adapter against `ase.neighborlist`, and in ASE's own tests."""

import inspect
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import ase.neighborlist
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.morse import MorsePotential
from structures import CRYSTALS, STRUCTURES, canonical, random_box

import diffnl
from diffnl.adapters.ase import neighbor_list, primitive_neighbor_list

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
    "unequal": lambda atoms: np.linspace(2.5, 0.0, len(atoms)),
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


BAD_CUTOFFS = {
    "zero": (0.0, "must be finite and > 0; got 0.0"),
    "negative": (-1.0, "must be finite and > 0; got -1.0"),
    "an element pair at 0": ({("Na", "Cl"): 0.0}, "must be > 0 for some pair"),
    "a negative pair": (
        {("Na", "Na"): 3.0, ("Na", "Cl"): -3.0},
        r"must be .* >= 0; got -3.0 for \('Na', 'Cl'\)",
    ),
    "radii of 0": (np.zeros(8), "must be > 0 for some pair"),
    "a negative radius": (np.linspace(-0.5, 2.0, 8), "must be finite and >= 0; got -0.5 for atom 0"),
    "radii for more atoms": (np.ones(10), r"must be a number or radii \(N,\) = \(8,\); got shape \(10,\)"),
    "an unknown symbol": ({("Na", "Ci"): 3.0}, r"must have pairs of symbols or .*; got \('Na', 'Ci'\)"),
    "an unknown number": ({("Na", 171): 3.0}, r"must have pairs of symbols or .*; got \('Na', 171\)"),
    "an element": ({11: 3.0}, "must have pairs of symbols or .*; got 11"),
}


@pytest.mark.parametrize("name", BAD_CUTOFFS)
def test_bad_cutoffs_are_errors_where_ase_says_nothing(name):
    cutoff, message = BAD_CUTOFFS[name]
    if name != "an element":
        assert ase.neighborlist.neighbor_list("i", CRYSTALS["salt"], cutoff).dtype == np.int64
    with pytest.raises(ValueError, match=f"`cutoff` {message}"):
        neighbor_list("i", CRYSTALS["salt"], cutoff)


def test_no_cutoffs_are_an_error():
    with pytest.raises(ValueError, match="`cutoff` must have a pair of elements at least; got an empty dict"):
        neighbor_list("i", CRYSTALS["salt"], {})


NO_NUMBERS = {
    "a text for a pair": {("Na", "Cl"): "2"},
    "an array for a pair": {("Na", "Cl"): np.array([2.0, 3.0])},
    "a complex number for a pair": {("Na", "Cl"): 2.0 + 0.5j},
    "texts": ["2"] * 8,
    "complex numbers": np.full(8, 2.0 + 0.5j),
    "numbers and arrays": [np.ones(2)] + [1.0] * 7,
    "flags": [True] * 8,
    "a complex number": 2.0 + 0.5j,
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_cutoffs_that_are_no_real_numbers(name):
    with pytest.raises(TypeError, match="`cutoff` must be a number"):
        neighbor_list("i", CRYSTALS["salt"], NO_NUMBERS[name])


@pytest.mark.parametrize("number", [int, np.int64, np.uint8])
def test_atomic_numbers_of_any_integer_type_in_a_dict(number):
    by_number = {(number(11), "Cl"): np.float32(3.0), (number(11), number(11)): 4.5}
    expected = neighbor_list("ijS", CRYSTALS["salt"], {("Na", "Cl"): 3.0, ("Na", "Na"): 4.5})
    assert len(expected[0]) > 20
    for mine, other in zip(neighbor_list("ijS", CRYSTALS["salt"], by_number), expected, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("key", [11, np.int64(11), 1.5, None], ids=repr)
def test_a_key_that_is_no_pair(key):
    with pytest.raises(
        ValueError, match="`cutoff` must have pairs of symbols or atomic numbers as keys; got"
    ):
        neighbor_list("i", CRYSTALS["salt"], {key: 3.0})


def test_radii_of_any_real_type():
    expected = neighbor_list("ijS", CRYSTALS["salt"], np.full(8, 2.0))
    for radii in (np.full(8, 2), [2] * 8, torch.full((8,), 2.0), [np.float32(2)] * 8, [Fraction(2)] * 8):
        for mine, other in zip(neighbor_list("ijS", CRYSTALS["salt"], radii), expected, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_radii_for_fewer_atoms_are_no_bare_index_error():
    with pytest.raises(IndexError):
        ase.neighborlist.neighbor_list("i", CRYSTALS["salt"], 2.0 * np.ones(5))
    with pytest.raises(
        ValueError, match=r"`cutoff` must be a number or radii \(N,\) = \(8,\); got shape \(5,\)"
    ):
        neighbor_list("i", CRYSTALS["salt"], np.ones(5))


def test_numbers_of_atoms_that_are_no_elements_may_have_cutoffs():
    atoms = CRYSTALS["salt"]
    numbers = np.where(atoms.numbers == 11, 1000, 17)
    arguments = (
        "ijSdD",
        atoms.pbc,
        atoms.cell,
        atoms.positions,
        {(1000, "Cl"): 4.0, (1000, 1000): 5.0},
        numbers,
    )
    theirs = ase.neighborlist.primitive_neighbor_list(*arguments)
    assert_same_list(primitive_neighbor_list(*arguments), theirs)
    assert len(theirs[0]) > 20


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


def test_a_periodic_axis_without_a_vector_is_an_error_and_not_one_of_length_1():
    atoms = Atoms("H2", [[0, 0, 0], [0.3, 0.4, 2.0]], cell=[4.0, 4.0, 0.0], pbc=True)
    assert ase.neighborlist.neighbor_list("S", atoms, 3.0)[:, 2].any()
    with pytest.raises(
        ValueError, match="`cell` must have linearly independent vectors on its periodic axes"
    ):
        neighbor_list("S", atoms, 3.0)


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


def test_imports_nothing_of_ase():
    """Neither the adapter nor its list needs ASE; only a dict of cutoffs and the calculator do."""
    code = (
        "import sys; import numpy as np; from diffnl.adapters.ase import primitive_neighbor_list as f\n"
        "assert len(f('i', [True] * 3, np.eye(3), np.zeros((1, 3)), 1.5)) == 18\n"
        "assert 'ase' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
