"""The pymatgen adapter against `find_points_in_spheres`, and under the methods of structures that call it."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pymatgen.optimization.neighbors
import pytest
from pymatgen.core import Lattice, Molecule, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.optimization.neighbors import find_points_in_spheres as theirs
from recipes import run_recipe
from structures import CRYSTALS, SLABS, STRUCTURES, canonical, random_box

from diffnl.adapters.pymatgen import find_points_in_spheres as ours

ADAPTER = "pymatgen"
PACKAGES = ("pymatgen", "pymatgen-core")

EVERY = STRUCTURES | {"random_box": random_box()}


def inputs(atoms, centers=None):
    """The arrays pymatgen wants; its lattice can be inverted even on open axes."""
    points = np.ascontiguousarray(atoms.positions)
    return {
        "all_coords": points,
        "center_coords": points if centers is None else np.ascontiguousarray(centers),
        "pbc": np.ascontiguousarray(atoms.pbc, dtype=np.int64),
        "lattice": np.ascontiguousarray(atoms.cell.complete().array),
    }


def assert_same(found, reference):
    """(centres, points, images, distances) of both."""
    for mine, its in zip(found, reference, strict=True):
        assert (mine.dtype, mine.shape[1:]) == (its.dtype, its.shape[1:])
    assert (np.diff(found[0]) >= 0).all()
    found, reference = canonical(*found), canonical(*reference)
    for mine, its in zip(found[:3], reference[:3], strict=True):
        assert np.array_equal(mine, its)
    np.testing.assert_allclose(found[3], reference[3], rtol=0, atol=1e-12)


def assert_same_answer(**arguments):
    reference = theirs(**arguments)
    assert_same(ours(**arguments), reference)
    return reference


@pytest.mark.parametrize("r", [0.5, 2.1, 4.0, 7.5])
@pytest.mark.parametrize("name", EVERY)
def test_every_point_a_centre(name, r):
    found = assert_same_answer(**inputs(EVERY[name]), r=r)
    # Each point is its own neighbour; by their rounding not always at 0.
    assert ((found[0] == found[1]) & ~found[2].any(axis=1)).sum() == len(EVERY[name])


@pytest.mark.parametrize("r", [0.9, 3.0, 6.0])
@pytest.mark.parametrize("name", EVERY)
def test_other_centres(name, r):
    """Centres off the points, far outside the cell too, of another number than the points."""
    atoms = EVERY[name]
    spread = np.random.default_rng(4).uniform(-1.5, 2.5, (5, 3))
    assert_same_answer(**inputs(atoms, spread @ atoms.cell.complete().array), r=r)


@pytest.mark.parametrize("name", CRYSTALS)
def test_centres_among_the_points(name):
    """Some of the points, backwards, and one of them twice: they find their own points at distance 0."""
    atoms = EVERY[name]
    centers = np.concatenate([atoms.positions[::-2], atoms.positions[:1]])
    found = assert_same_answer(**inputs(atoms, centers), r=4.0)
    assert (found[3] < 1e-7).sum() >= len(centers)


def test_same_signature():
    """The names, order and defaults of the C function, which are in its stub and in its docstring only."""
    parameters = inspect.signature(ours).parameters
    assert list(parameters) == ["all_coords", "center_coords", "r", "pbc", "lattice", "tol", "min_r"]
    arguments = inputs(CRYSTALS["salt"])
    by_place = *(arguments[name] for name in ("all_coords", "center_coords")), 3.0
    by_place += arguments["pbc"], arguments["lattice"]
    assert_same(ours(*by_place), theirs(*by_place))
    assert_same(ours(*by_place, 0.1, 4.0), theirs(*by_place, 0.1, 4.0))
    assert_same(ours(*by_place), theirs(*by_place, 1e-8, 1.0))


SIMPLE_CUBIC = {
    "all_coords": np.zeros((1, 3)),
    "center_coords": np.zeros((1, 3)),
    "pbc": np.ones(3, dtype=np.int64),
    "lattice": np.eye(3),
}


@pytest.mark.parametrize(
    ("r", "tol", "count"),
    [
        (1.0, 1e-8, 7),
        (1.0, 0.0, 1),  # d^2 < r^2 + tol is strict
        (1.0 - 1e-9, 1e-8, 1),  # r < min_r: tol has no say
        (math.sqrt(2.0), 1e-8, 19),
        (math.sqrt(2.0), 0.0, 19),  # its square is above 2
        (math.sqrt(3.0), 0.0, 19),  # its square is below 3
        (math.sqrt(2.0 - 0.5e-8), 1e-8, 19),  # tol is added to the square
        (math.sqrt(2.0 - 2e-8), 1e-8, 7),
        (1.4, 0.1, 19),
    ],
)
def test_pairs_at_the_radius(r, tol, count):
    assert len(assert_same_answer(**SIMPLE_CUBIC, r=r, tol=tol)[0]) == count


@pytest.mark.parametrize(
    ("r", "min_r", "count"),
    [(1.0, 2.0, 7), (1.0 - 1e-12, 2.0, 1), (math.sqrt(2.0), 2.0, 19), (0.0, 1.0, 1)],
)
def test_small_radii_include_pairs_at_the_radius(r, min_r, count):
    assert len(assert_same_answer(**SIMPLE_CUBIC, r=r, min_r=min_r)[0]) == count


def test_coincident_points():
    arguments = SIMPLE_CUBIC | dict.fromkeys(("all_coords", "center_coords"), np.full((2, 3), 0.25))
    found = assert_same_answer(**arguments, r=0.5)
    assert len(found[0]) == 4


def test_nothing_in_reach():
    arguments = SIMPLE_CUBIC | {
        "lattice": 9.0 * np.eye(3),
        "center_coords": np.full((2, 3), 4.5),
        "pbc": np.zeros(3, dtype=np.int64),
    }
    assert_same_answer(**arguments, r=2.0)
    assert len(ours(**arguments, r=2.0)[0]) == 0


@pytest.mark.parametrize("empty", [("all_coords",), ("center_coords",), ("all_coords", "center_coords")])
def test_nothing_to_search(empty):
    """pymatgen refuses; its empty lists look like these."""
    arguments = SIMPLE_CUBIC | dict.fromkeys(empty, np.zeros((0, 3)))
    with pytest.raises(ValueError, match="NULL pointer"):
        theirs(**arguments, r=2.0)
    found = ours(**arguments, r=2.0)
    assert [array.dtype for array in found] == [np.int64, np.int64, np.float64, np.float64]
    assert [array.shape for array in found] == [(0,), (0,), (0, 3), (0,)]


def test_values_that_are_not_finite():
    with pytest.raises(ValueError, match="`positions`"):
        ours(**SIMPLE_CUBIC | {"all_coords": np.full((1, 3), np.nan)}, r=2.0)
    with pytest.raises(ValueError, match="`cell`"):
        ours(**SIMPLE_CUBIC | {"lattice": np.diag([1.0, 1.0, 0.0])}, r=2.0)
    assert len(theirs(**SIMPLE_CUBIC, r=-0.5)[0]) == 0
    with pytest.raises(ValueError, match="`r` must be finite and >= 0; got -0.5"):
        ours(**SIMPLE_CUBIC, r=-0.5)
    for min_r in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=f"`min_r` must be finite and >= 0; got {min_r}"):
            ours(**SIMPLE_CUBIC, r=2.0, min_r=min_r)
    with pytest.raises(TypeError, match="`min_r` must be a number; got 'x' of type str"):
        ours(**SIMPLE_CUBIC, r=2.0, min_r="x")


# Structures, which import the function inside their methods.


@pytest.fixture
def on_ours(monkeypatch):
    """Runs a call on our search, and makes sure that it was."""

    def run(call):
        count = 0

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            return ours(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(pymatgen.optimization.neighbors, "find_points_in_spheres", counted)
            result = call()
        assert count > 0
        return result

    return run


def structures():
    yield from ((name, AseAtomsAdaptor.get_structure(atoms)) for name, atoms in (CRYSTALS | SLABS).items())
    sheared = Lattice([[2.1, 0.0, 0.0], [1.7, 1.5, 0.0], [-1.1, 0.8, 1.9]])
    sites = [[0.1, -1.8, 2.3], [0.55, 0.4, 0.52], [0.1, 0.2, 0.6]]
    yield "small_and_skewed", Structure(sheared, ["Li", "O", "Li"], sites)
    yield "two_axes", Structure(Lattice(sheared.matrix, pbc=(True, True, False)), ["Li", "O", "Li"], sites)


NAMED = dict(structures())


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("r", [0.7, 3.1, 6.0])
@pytest.mark.parametrize("name", NAMED)
def test_get_neighbor_list(name, r, exclude_self, on_ours):
    def call():
        return NAMED[name].get_neighbor_list(r, exclude_self=exclude_self)

    assert_same(on_ours(call), call())


@pytest.mark.parametrize("name", NAMED)
def test_get_neighbor_list_of_some_sites(name, on_ours):
    structure = NAMED[name]

    def call():
        return structure.get_neighbor_list(4.0, sites=structure.sites[-1:] + structure.sites[:1])

    assert_same(on_ours(call), call())


def as_set(neighbors):
    return sorted((n.index, *map(int, n.image), round(n.nn_distance, 9)) for n in neighbors)


@pytest.mark.parametrize("name", NAMED)
def test_get_all_neighbors(name, on_ours):
    def call():
        return [as_set(neighbors) for neighbors in NAMED[name].get_all_neighbors(4.5)]

    found = on_ours(call)
    assert found == call()
    assert any(any(image) for neighbors in found for _, *image, _ in neighbors)


@pytest.mark.parametrize("name", NAMED)
def test_get_sites_in_sphere(name, on_ours):
    def call():
        return as_set(NAMED[name].get_sites_in_sphere([0.3, -2.0, 9.0], 5.0))

    assert on_ours(call) == call()


@pytest.mark.parametrize("unique", [False, True])
def test_get_symmetric_neighbor_list(unique, on_ours):
    """Its symmetries depend on the order of pairs; the number of classes does not, nor the pairs."""
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])

    def call():
        found = structure.get_symmetric_neighbor_list(2.5, "Fm-3m", unique=unique)
        return canonical(*found[:4]) if not unique else np.sort(found[3]), len(set(found[4].tolist()))

    (mine, classes), (its, same) = on_ours(call), call()
    assert classes == same
    for a, b in zip(mine, its, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_bonds_of_a_local_environment(on_ours):
    """A driver further up: coordination numbers of `CrystalNN` on rock salt."""
    from pymatgen.analysis.local_env import CrystalNN

    def call():
        return [CrystalNN().get_cn(NAMED["salt"], n) for n in range(2)]

    assert on_ours(call) == call()


def test_molecule_boxed(on_ours):
    water = Molecule("OHH", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]).get_boxed_structure(6, 6, 6)

    def call():
        return water.get_neighbor_list(1.2)

    found = on_ours(call)
    assert_same(found, call())
    assert len(found[0]) == 4


def test_imports_nothing_of_pymatgen():
    code = "import sys; import diffnl.adapters.pymatgen; assert 'pymatgen' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipe():
    names = run_recipe("pymatgen")
    assert_same(names["found"], names["structure"].get_neighbor_list(3.0))
