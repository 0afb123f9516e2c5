"""nvalchemi-toolkit-ops: both forms of its list against its own and ASE's, its Coulomb energies, NequIP."""

import inspect

import numpy as np
import nvalchemiops.torch.neighbors as real
import pytest
import torch
from ase.neighborlist import neighbor_list as ase_neighbor_list
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import NeighborListTransform
from nvalchemi_lists import (
    METHODS,
    assert_same,
    assert_same_kind,
    batch,
    coo,
    index_of,
    pairs_of_matrix,
    tensors,
)
from nvalchemiops.torch.interactions.electrostatics.coulomb import coulomb_energy_forces
from recipes import run_recipe
from structures import CRYSTALS, SLABS, STRUCTURES, canonical, random_box

from diffnl.adapters.nvalchemi import neighbor_list

ADAPTER = "nvalchemi-toolkit-ops"
PACKAGES = ("nvalchemi-toolkit-ops", "warp-lang")
DTYPES = [torch.float64, torch.float32]
# Its methods lose pairs of cells with two zero vectors, or refuse them: that one is held against ASE alone.
PEERS = {name: atoms for name, atoms in STRUCTURES.items() if name != "wire"} | {"random": random_box()}


def test_signature():
    ours, theirs = (inspect.signature(f).parameters for f in (neighbor_list, real.neighbor_list))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


# One system --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cutoff", [2.9, 6.3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PEERS)
def test_coo(name, method, cutoff, dtype):
    where = tensors(PEERS[name], dtype)
    options = dict(return_neighbor_list=True, max_neighbors=300, method=method)
    ours, theirs = (f(where[0], cutoff, *where[1:], **options) for f in (neighbor_list, real.neighbor_list))
    assert_same_kind(ours, theirs)
    assert_same(ours, theirs)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PEERS)
def test_matrix(name, method, dtype):
    where = tensors(PEERS[name], dtype)
    options = dict(max_neighbors=150, method=method)
    ours, theirs = (f(where[0], 4.7, *where[1:], **options) for f in (neighbor_list, real.neighbor_list))
    assert_same_kind(ours, theirs)
    assert torch.equal(ours[1], theirs[1])
    assert_same(pairs_of_matrix(*ours), pairs_of_matrix(*theirs))
    empty = torch.arange(150) >= ours[1][:, None]
    assert torch.equal(ours[0][empty], theirs[0][empty]) and (ours[0][empty] == len(where[0])).all()
    if len(ours) > 2:
        assert (ours[2][empty] == 0).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_against_ase(name):
    atoms = STRUCTURES[name]
    cell, pbc = torch.tensor(atoms.cell.array), torch.tensor(atoms.pbc)
    ours = neighbor_list(torch.tensor(atoms.positions), 5.1, cell, pbc, return_neighbor_list=True)
    for mine, other in zip(coo(ours), canonical(*ase_neighbor_list("ijS", atoms, 5.1)), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PEERS)
def test_half(name, method):
    """One of the two directions of each pair; its own methods do not agree on which."""
    where = tensors(PEERS[name])
    options = dict(return_neighbor_list=True, half_fill=True, max_neighbors=300, method=method)
    ours, theirs = (f(where[0], 5.1, *where[1:], **options) for f in (neighbor_list, real.neighbor_list))
    assert_same_kind(ours[:1] + ours[2:], theirs[:1] + theirs[2:])

    def both(found):
        i, j, shifts = coo(found)
        return canonical(np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([shifts, -shifts]))

    for mine, other in zip(both(ours), both(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)
    i, j, shifts = coo(ours)
    assert all(a < b or a == b and tuple(s) > (0, 0, 0) for a, b, s in zip(i, j, shifts, strict=True))


@pytest.mark.parametrize("cutoff", [1.7, 2.5, 3.1, 5.0, 8.3])
def test_default_width(cutoff):
    where = tensors(STRUCTURES["one_atom"])
    ours, theirs = (f(where[0], cutoff, method="naive") for f in (neighbor_list, real.neighbor_list))
    assert_same_kind(ours, theirs)


def test_fill_value_and_given_matrices():
    positions, cell, pbc = tensors(CRYSTALS["salt"])
    results = []
    for f in (neighbor_list, real.neighbor_list):
        given = dict(
            neighbor_matrix=torch.full((8, 40), 7, dtype=torch.int32),
            num_neighbors=torch.full((8,), 7, dtype=torch.int32),
            neighbor_matrix_shifts=torch.full((8, 40, 3), 7, dtype=torch.int32),
        )
        found = f(positions, 4.1, cell, pbc, fill_value=-1, method="naive", **given)
        for tensor, name in zip(found, given, strict=True):
            assert tensor.data_ptr() == given[name].data_ptr()
        results.append(found)
    ours, theirs = results
    assert_same_kind(ours, theirs)
    assert_same(pairs_of_matrix(*ours), pairs_of_matrix(*theirs))
    assert (ours[0] == -1).sum() == (theirs[0] == -1).sum() > 0


@pytest.mark.parametrize("method", [None, *METHODS])
def test_strictly_closer(method):
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    cell, pbc = 10.0 * torch.eye(3, dtype=torch.float64), torch.tensor([True, True, False])
    for f in (neighbor_list, real.neighbor_list):
        assert f(positions, 2.0, cell, pbc, method=method)[1].tolist() == [0, 0]
        assert f(positions, 2.0 + 1e-9, cell, pbc, method=method)[1].tolist() == [1, 1]


def test_no_atoms():
    positions, cell, pbc = tensors(CRYSTALS["salt"])
    for coo_form in (True, False):
        ours, theirs = (
            f(positions[:0], 4.0, cell, pbc, return_neighbor_list=coo_form, method="naive")
            for f in (neighbor_list, real.neighbor_list)
        )
        assert_same_kind(ours, theirs)


# Batches -----------------------------------------------------------------------------------------

CASES = [[*CRYSTALS], ["salt", *SLABS, "silicon"], ["graphene"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["idx", "ptr", "both"])
@pytest.mark.parametrize("method", [None, *METHODS, "batch_naive"])
@pytest.mark.parametrize("names", CASES, ids=["crystals", "mixed", "single"])
def test_batch(names, method, given, dtype):
    positions, cell, pbc, ptr = batch(names, dtype)
    which = {"idx": dict(batch_idx=index_of(ptr)), "ptr": dict(batch_ptr=ptr)}
    options = which["idx"] | which["ptr"] if given == "both" else which[given]
    options |= dict(max_neighbors=300, method=method)
    for coo_form in (True, False):
        ours, theirs = (
            f(positions, 4.3, cell, pbc, return_neighbor_list=coo_form, **options)
            for f in (neighbor_list, real.neighbor_list)
        )
        assert_same_kind(ours, theirs)
        assert torch.equal(ours[1], theirs[1])
        if coo_form:
            assert_same(ours, theirs)
        else:
            assert_same(pairs_of_matrix(*ours), pairs_of_matrix(*theirs))


@pytest.mark.parametrize("method", METHODS)
def test_open_batch(method):
    positions, _, _, ptr = batch(["ethanol", "one_atom", "salt"])
    for options in (dict(batch_ptr=ptr), dict(batch_idx=index_of(ptr))):
        ours, theirs = (
            f(positions, 4.0, return_neighbor_list=True, method=method, **options)
            for f in (neighbor_list, real.neighbor_list)
        )
        assert_same_kind(ours, theirs)
        assert_same(ours, theirs)


def test_empty_systems():
    positions, cell, pbc, ptr = batch(["salt", "silicon", "magnesium"])
    ptr = torch.tensor([0, 8, 8, 10], dtype=torch.int32)
    ours, theirs = (
        f(positions[:10], 4.0, cell, pbc, batch_ptr=ptr, return_neighbor_list=True, method="naive")
        for f in (neighbor_list, real.neighbor_list)
    )
    assert_same(ours, theirs)


def test_one_cell_for_all():
    """As documented there, where the methods that are batched read beyond the only cell."""
    positions, cell, pbc, ptr = batch(["salt", "salt"])
    every = neighbor_list(positions, 4.0, cell, pbc, batch_ptr=ptr, return_neighbor_list=True)
    for one_cell, one_pbc in [(cell[0], pbc[0]), (cell[:1], pbc[:1])]:
        for which in (dict(batch_ptr=ptr), dict(batch_idx=index_of(ptr))):
            one = neighbor_list(positions, 4.0, one_cell, one_pbc, return_neighbor_list=True, **which)
            assert all(torch.equal(a, b) for a, b in zip(one, every, strict=True))


# Two cutoffs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("coo_form", [True, False])
def test_two_cutoffs(batched, coo_form):
    positions, cell, pbc, ptr = batch(["salt", "silicon", "gallium_nitride"])
    options = dict(cutoff2=4.6, return_neighbor_list=coo_form)
    where = (positions, 3.1, cell, pbc)
    if batched:
        options |= dict(batch_ptr=ptr)
    else:
        where = (positions[:8], 3.1, cell[0], pbc[0])
    ours, theirs = (f(*where, **options) for f in (neighbor_list, real.neighbor_list))
    assert len(ours) == 6
    assert_same_kind(ours, theirs)
    for k in (0, 3):
        mine, other = ours[k : k + 3], theirs[k : k + 3]
        assert torch.equal(mine[1], other[1])
        assert_same(*((mine, other) if coo_form else (pairs_of_matrix(*mine), pairs_of_matrix(*other))))


def test_widths_of_two_cutoffs():
    where = tensors(CRYSTALS["salt"])
    for widths in (dict(max_neighbors1=30, max_neighbors2=70), dict(max_neighbors1=60)):
        ours, theirs = (
            f(where[0], 3.1, *where[1:], cutoff2=4.6, **widths) for f in (neighbor_list, real.neighbor_list)
        )
        assert_same_kind(ours, theirs)


# Distances and vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["silicon_sheared", "oxide_anywhere", "graphene", "ethanol"])
def test_geometry(name, method, dtype):
    positions, cell, pbc = tensors(STRUCTURES[name], dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for wanted in (["distances"], ["vectors"], ["distances", "vectors"]):
        options = {f"return_{what}": True for what in wanted} | dict(method=method, max_neighbors=120)
        matrices = [f(positions, 4.1, cell, pbc, **options) for f in (neighbor_list, real.neighbor_list)]
        lists = [
            f(positions, 4.1, cell, pbc, return_neighbor_list=True, **options)
            for f in (neighbor_list, real.neighbor_list)
        ]
        assert_same_kind(*matrices)
        assert_same_kind(*lists)
        extra = len(wanted)
        ours, theirs = (coo(x[:-extra], *x[-extra:]) for x in lists)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance)
        matrix, number, flat = matrices[0][0], matrices[0][1], lists[0]
        empty = torch.arange(120) >= number[:, None]
        for column in range(-extra, 0):
            assert torch.equal(matrices[0][column][~empty], flat[column])
            assert (matrices[0][column][empty] == 0).all()
        assert matrix.shape[1] == 120


@pytest.mark.parametrize("coo_form", [True, False])
@pytest.mark.parametrize("wanted", ["distances", "vectors"])
def test_gradients(coo_form, wanted):
    positions, cell, pbc, ptr = batch(["silicon", "gallium_nitride"])
    options = {f"return_{wanted}": True, "return_neighbor_list": coo_form, "batch_ptr": ptr}

    def derivatives(f):
        inputs = [positions.clone().requires_grad_(), cell.clone().requires_grad_()]
        values = f(inputs[0], 4.1, inputs[1], pbc, **options)[-1]
        first = torch.autograd.grad(((0.1 * values) ** 4).sum(), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum((x**2).sum() for x in first), inputs)

    for mine, other in zip(derivatives(neighbor_list), derivatives(real.neighbor_list), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    positions, cell, pbc, ptr = batch(["silicon", "magnesium"])
    options = dict(return_distances=True, return_vectors=True, batch_ptr=ptr, max_neighbors=20)

    def geometry(positions, cell):
        return neighbor_list(positions, 3.3, cell, pbc, **options)[3:]

    inputs = positions.requires_grad_(), cell.requires_grad_()
    assert torch.autograd.gradcheck(geometry, inputs) and torch.autograd.gradgradcheck(geometry, inputs)


def test_cut_off_rows_have_gradients():
    """A matrix that is too small keeps the first neighbours of a row, and their derivatives."""
    positions, cell, pbc = tensors(CRYSTALS["salt"])
    positions.requires_grad_()
    wide, narrow = (
        neighbor_list(positions, 4.1, cell, pbc, max_neighbors=width, return_vectors=True)[3]
        for width in (40, 5)
    )
    torch.testing.assert_close(narrow, wide[:, :5], rtol=0, atol=0)
    grads = [torch.autograd.grad(x.square().sum(), positions)[0] for x in (narrow, wide[:, :5])]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


# What uses it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coo_form", [True, False])
def test_coulomb(coo_form):
    """Energies and forces of the package itself, from our list and from its own."""
    positions, cell, pbc, ptr = batch(["salt", "gallium_nitride", "oxide_anywhere"])
    charges = torch.linspace(-1.0, 1.0, len(positions), dtype=torch.float64)
    idx = index_of(ptr)
    results = []
    for f in (neighbor_list, real.neighbor_list):
        found = f(positions, 6.0, cell, pbc, batch_idx=idx, max_neighbors=200, return_neighbor_list=coo_form)
        if coo_form:
            topology = dict(neighbor_list=found[0], neighbor_ptr=found[1], neighbor_shifts=found[2])
        else:
            topology = dict(
                neighbor_matrix=found[0], neighbor_matrix_shifts=found[2], fill_value=len(positions)
            )
        results.append(
            coulomb_energy_forces(positions, charges, cell, 6.0, alpha=0.3, batch_idx=idx, **topology)
        )
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
        assert mine.abs().max() > 1e-3


def test_nequip(monkeypatch):
    """NequIP's backend "alchemiops" hard-depends on `batch_cell_list`, which is this with a method."""
    calls = []

    def batch_cell_list(positions, cutoff, cell, pbc, batch_idx, **options):
        calls.append(options)
        return neighbor_list(positions, cutoff, cell, pbc, batch_idx, method="batch_cell_list", **options)

    frames = [from_ase(STRUCTURES[name]) for name in ("salt", "slab_with_oxygen", "silicon_sheared")]
    transform = NeighborListTransform(4.2, backend="alchemiops")
    theirs = transform(AtomicDataDict.batched_from_list([dict(frame) for frame in frames]))
    monkeypatch.setattr(real, "batch_cell_list", batch_cell_list)
    monkeypatch.setattr("nequip.data._nl.alchemiops_nl", None)  # what it has imported before
    ours = transform(AtomicDataDict.batched_from_list([dict(frame) for frame in frames]))
    assert calls
    keys = AtomicDataDict.EDGE_INDEX_KEY, AtomicDataDict.EDGE_CELL_SHIFT_KEY
    for mine, other in zip(*(canonical(*x[keys[0]], x[keys[1]]) for x in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_recipe():
    names = run_recipe("nvalchemi-toolkit-ops")
    assert torch.equal(names["num_neighbors"], names["neighbor_ptr"].diff())
    assert names["vectors"].shape[1:] == (names["matrix"].shape[1], 3)
