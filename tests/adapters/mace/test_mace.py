"""MACE's neighbour list and edge vectors, and what `install` replaces, against MACE's own."""

from copy import deepcopy

import mace.data as mace_data
import mace.data.neighborhood
import mace.modules.models
import mace.modules.utils
import numpy as np
import pytest
import torch
from mace.data import AtomicData, config_from_atoms
from random_mace import CUTOFF, FRAMES, TABLE, batch_of, float64, given  # noqa: F401
from recipes import run_recipe
from structures import CRYSTALS, OPEN, STRUCTURES, canonical, random_box

from diffnl.adapters import mace as adapter

ADAPTER = "MACE"
PACKAGES = ("mace-torch",)

pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------------------------------- the list


def both(**arguments):
    return [
        function(**deepcopy(arguments))
        for function in (adapter.get_neighborhood, mace.data.neighborhood.get_neighborhood)
    ]


def assert_same_neighborhood(ours, theirs):
    """All but the cell, which is MACE's own fault on open axes: the tests after this one have ours."""
    for mine, other in zip(ours, theirs, strict=True):
        assert (type(mine), mine.shape) == (type(other), other.shape)
    assert [mine.dtype for mine in ours[::2]] == [other.dtype for other in theirs[::2]]
    assert (np.diff(ours[0][0]) >= 0).all()
    ours_sorted, theirs_sorted = (canonical(*out[0], out[2], out[1]) for out in (ours, theirs))
    for mine, other in zip(ours_sorted, theirs_sorted, strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(ours[1], np.dot(ours[2], ours[3]))


@pytest.mark.parametrize("cutoff", [2.6, CUTOFF, 7.3])
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_neighborhood(name, cutoff):
    assert_same_neighborhood(*both(cutoff=cutoff, **given(STRUCTURES[name])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False), None])
def test_same_neighborhood_of_any_dtype_and_boundary(pbc, dtype):
    box = random_box()
    arguments = {"positions": box.positions.astype(dtype), "pbc": pbc, "cell": box.cell.array.copy()}
    if pbc == (True, False, True):
        arguments["pbc"] = np.array(pbc)
    assert_same_neighborhood(*both(cutoff=5.0, **arguments))
    arguments["positions"] = np.asfortranarray(arguments["positions"])[::-1]
    assert_same_neighborhood(*both(cutoff=5.0, **arguments))


def test_integers_in_the_cell_stay_integers():
    positions = 3.0 * np.random.default_rng(0).random((5, 3))
    for pbc in ((True, True, True), (True, False, True)):
        ours, theirs = both(positions=positions, cutoff=2.0, pbc=pbc, cell=np.diag([3, 3, 3]))
        assert ours[3].dtype == ours[1].dtype == np.int64
        np.testing.assert_array_equal(ours[3], np.diag([3, 3, 3]))
        assert_same_neighborhood(ours, theirs)
    ours, theirs = both(positions=positions, cutoff=0.3, pbc=(True, False, True), cell=np.diag([3, 0, 3]))
    assert theirs[3][1, 1] == int(1.5 * (1 + positions.max()))  # MACE cuts its length off
    assert ours[3].dtype == np.float64 and ours[3][1, 1] != int(ours[3][1, 1])


# --------------------------------------------------------------- the cell, where MACE's is not the user's

ON_Y = np.array([[3.0, 0, 0], [1.0, 0, 4.0], [0, 15.0, 0]])  # the third axis is open, along y
SKEW = np.array([[3.0, 0, 0], [0, 4.0, 0], [2.0, 1.0, 12.0]])


@pytest.mark.parametrize("kind", ["as it is", "a view", "in Fortran's order", "read only"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_writes_to_nothing_it_is_given(name, kind):
    """MACE overwrites rows of the caller's cell on open axes, in place."""
    atoms = STRUCTURES[name]
    given = [np.array(atoms.positions), np.array(atoms.cell.array)]
    if kind == "a view":
        given = [np.repeat(array, 2, axis=0)[::2] for array in given]
    given = [np.asfortranarray(array) if "Fortran" in kind else array for array in given]
    before = [array.copy() for array in given]
    for array in given:
        array.flags.writeable = kind != "read only"
    *_, shifts, cell = adapter.get_neighborhood(given[0], CUTOFF, tuple(atoms.pbc.tolist()), given[1])
    assert not np.shares_memory(cell, given[1])
    cell += 1.0
    for array, was in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, was)


@pytest.mark.parametrize("offset", [0.0, 50.0, 1e4])
@pytest.mark.parametrize("cell", [ON_Y, SKEW], ids=["vacuum along y", "skew vacuum"])
def test_the_cell_of_a_slab_is_its_own(cell, offset):
    """MACE's third row is along z, and grows with the distance from the origin."""
    positions = offset + np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    pbc = (True, True, False)
    edges, shifts, unit_shifts, ours = adapter.get_neighborhood(positions, 3.5, pbc, cell)
    np.testing.assert_array_equal(ours, cell)
    assert edges.shape[1] >= 10 and not unit_shifts[:, 2].any()
    np.testing.assert_array_equal(shifts, unit_shifts @ cell)
    theirs = mace.data.neighborhood.get_neighborhood
    if offset == 0.0:
        *_, their_cell = theirs(positions, 3.5, pbc, SKEW.copy())
        assert their_cell[2, 2] == pytest.approx(5 * 3.5 * 2)


def test_mace_has_no_volume_for_a_slab_with_its_vacuum_along_y():
    cell = ON_Y.copy()
    with pytest.raises((ValueError, np.linalg.LinAlgError, RuntimeError, ZeroDivisionError)):
        mace.data.neighborhood.get_neighborhood(np.zeros((1, 3)), 3.5, (True, True, False), cell)
    assert np.linalg.det(cell) == 0.0 and cell[2, 2] > 0.0


@pytest.mark.parametrize(
    ("rows", "pbc", "normals"),
    [
        ([[3.0, 0, 0], [0, 4.0, 0], [0, 0, 0]], (True, True, False), {2: [0, 0, 1.0]}),
        ([[3.0, 0, 0], [0, 0, 0], [0, 4.0, 0]], (True, False, True), {1: [0, 0, -1.0]}),
        ([[3.0, 0, 0], [0, 0, 4.0], [0, 0, 0]], (True, True, False), {2: [0, -1.0, 0]}),
        ([[3.0, 0, 0], [0, 4.0, 0], [6.0, 0, 0]], (True, True, False), {2: [0, 0, 1.0]}),
        ([[0, 0, 0], [0, 0, 0], [0, 0, 2.9]], (False, False, True), {0: [1.0, 0, 0], 1: [0, 1.0, 0]}),
        ([[2.0, 0, 0], [0, 0, 0], [0, 0, 0]], (True, False, False), {1: [0, 1.0, 0], 2: [0, 0, 1.0]}),
    ],
    ids=["xy", "xzy", "xz", "in the plane", "wire along z", "wire along x"],
)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_rows_without_a_volume_become_normals(rows, pbc, normals, offset):
    """As long as MACE's of atoms around the origin, wherever they are; right-handed."""
    positions = offset + np.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    *_, cell = adapter.get_neighborhood(positions, 3.0, pbc, np.array(rows))
    expected = np.array(rows)
    for axis, normal in normals.items():
        expected[axis] = 5 * 3.0 * (1 + 1) * np.array(normal)
    np.testing.assert_allclose(cell, expected, rtol=1e-12, atol=1e-12)
    assert np.linalg.det(cell) > 0


@pytest.mark.parametrize(
    "cell", [None, np.zeros((3, 3)), np.diag([8.0, 9.0, 10.0])], ids=["none", "0", "box"]
)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_without_a_periodic_axis_the_cell_is_long_wherever_the_atoms_are(cell, offset):
    positions = OPEN["ethanol"].positions
    middle = (positions.max(0) + positions.min(0)) / 2
    *rest, ours = adapter.get_neighborhood(positions + offset, 2.0, None, cell)
    *_, theirs = mace.data.neighborhood.get_neighborhood(positions - middle, 2.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert rest[0].shape[1] > 0 and not rest[1].any()


@pytest.mark.parametrize("true_self_interaction", [False, True])
def test_strict_cutoff_coincident_atoms_and_self_pairs(true_self_interaction):
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    for cutoff, pairs in ((1.0, 2), (np.nextafter(1.0, 2.0), 6)):
        ours, theirs = both(positions=positions, cutoff=cutoff, true_self_interaction=true_self_interaction)
        assert ours[0].shape == (2, pairs)
        assert_same_neighborhood(ours, theirs)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"pbc": (1, 0, 0)}, AssertionError),
        ({"pbc": (True, True)}, AssertionError),
        ({"cell": np.eye(2)}, AssertionError),
        ({"positions": np.zeros((0, 3))}, ValueError),
        ({"pbc": (True, True, True), "cell": np.diag([3.0, 3.0, 0.0])}, ValueError),
        ({"cutoff": 0.0}, ValueError),
    ],
)
def test_errors_of_mace(bad, error):
    for function in (adapter.get_neighborhood, mace.data.neighborhood.get_neighborhood):
        with pytest.raises(error):
            function(**deepcopy({"positions": np.ones((2, 3)), "cutoff": 2.0} | bad))


@pytest.mark.parametrize(
    ("bad", "message", "theirs"),
    [
        # A cube of 1 Å, full of images.
        ({"pbc": (True, True, True)}, "`cell` must be given where `pbc` is true", 64),
        ({"positions": np.array([[0.0, 0, 0], [np.nan, 0, 0]])}, "`positions` must be finite", 0),
        ({"cutoff": -2.0}, "`cutoff` must be finite and > 0", 2),
    ],
)
def test_errors_where_mace_says_nothing(bad, message, theirs):
    arguments = {"positions": np.array([[0.0, 0, 0], [0.4, 0, 0]]), "cutoff": 2.0} | bad
    assert mace.data.neighborhood.get_neighborhood(**deepcopy(arguments))[0].shape[1] >= theirs
    with pytest.raises(ValueError, match=message):
        adapter.get_neighborhood(**arguments)


# -------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_and_lengths_of_mace(normalize, dtype):
    data = batch_of(FRAMES, dtype)
    theirs = mace.modules.utils.get_edge_vectors_and_lengths(
        data.positions, data.edge_index, data.shifts, normalize, 1e-3
    )
    for cell in (data.cell, data.cell.view(-1, 3, 3)):
        ours = adapter.edge_vectors_and_lengths(
            data.positions, data.edge_index, data.unit_shifts, cell, data.batch, normalize, 1e-3
        )
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.shape, mine.dtype) == (other.shape, dtype)
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_derivatives_of_the_block():
    data = batch_of([CRYSTALS["silicon"], STRUCTURES["graphene"]])

    def block(positions, cell):
        edges = data.edge_index[:, ::7], data.unit_shifts[::7]
        return adapter.edge_vectors_and_lengths(positions, *edges, cell, data.batch)

    inputs = data.positions.requires_grad_(), data.cell.requires_grad_()
    assert torch.autograd.gradcheck(block, inputs)
    assert torch.autograd.gradgradcheck(block, inputs)


# ------------------------------------------------------------------------------- installed in MACE


def test_install_is_undone_and_nests():
    places = [
        (mace_data, "get_neighborhood"),
        (mace_data.atomic_data, "get_neighborhood"),
        (mace_data.neighborhood, "get_neighborhood"),
        (mace.modules.models, "prepare_graph"),
        (mace.modules.extensions, "prepare_graph"),
    ]

    def now():
        return [getattr(module, name) for module, name in places]

    before, ours = now(), [getattr(adapter, name) for _, name in places]
    undo = adapter.install()
    assert now() == ours
    with adapter.install():
        assert now() == ours
    assert now() == ours
    undo.close()
    assert now() == before
    with pytest.raises(ZeroDivisionError), adapter.install():
        raise ZeroDivisionError
    assert now() == before


def test_data_of_a_configuration():
    for atoms in STRUCTURES.values():
        config = config_from_atoms(atoms)
        theirs = AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF)
        with adapter.install():
            ours = AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF)
        assert ours.keys == theirs.keys
        for key in ("edge_index", "shifts", "unit_shifts", "cell", "rcell", "volume", "positions"):
            assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key
        for key in ("cell", "rcell", "volume") if atoms.pbc.all() else ():
            assert torch.equal(ours[key], theirs[key])
        if atoms.cell.rank == 3:
            assert ours.volume.item() == pytest.approx(np.linalg.det(atoms.cell.array), rel=1e-12)
            assert torch.equal(ours.cell, torch.tensor(atoms.cell.array))
        assert abs(ours.volume) > 0
        pairs = [canonical(*data.edge_index, data.unit_shifts, data.shifts) for data in (ours, theirs)]
        for mine, other in zip(*pairs, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_recipe():
    torch.set_default_dtype(torch.float32)
    names = run_recipe("MACE")
    assert names["forces"].shape == (8, 3) and names["stress"].abs().max() > 1e-4
    assert mace.modules.models.prepare_graph is mace.modules.utils.prepare_graph
