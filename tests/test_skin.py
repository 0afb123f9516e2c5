"""`skin=`: searched once, used many times, at every call the pairs, bits and gradients of a fresh list."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import assert_close_sums, assert_equal_bits, assert_same_bits
from conftest import EMULATED, SLOW
from systems import SYSTEMS, TRICLINIC, cubic, scatter, tensor
from torch.fx.experimental.proxy_tensor import make_fx
from walks import npt_walk

import diffnl

CUTOFF = 4.0


def fresh(positions, cell, pbc, system_idx=None, cutoff=CUTOFF, **options):
    return diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, sorted=True, **options)


@pytest.fixture
def box(device, dtype):
    """A triclinic box of 60 atoms."""
    cell = [[1.7 * x for x in row] for row in TRICLINIC]
    return scatter(60, cell, 11).to(device, dtype), tensor(cell).to(device, dtype)


def assert_counts(layer, searched, reused):
    assert (layer.searches, layer.reuses) == (searched, reused)


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_a_walk_at_constant_pressure(full, device, dtype):
    """Triclinic cells that breathe, mixed pbc, a batch of 5, atoms that leave their cells."""
    steps = 150 if SLOW else 2_000
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, full=full)
    for positions, cell, pbc, system_idx in npt_walk(steps, dtype, device):
        found = layer(positions, cell, pbc, system_idx)
        assert_same_bits(found, fresh(positions, cell, pbc, system_idx, full=full))
    assert layer.searches + layer.reuses == steps
    assert layer.searches > steps / 100 and layer.reuses > 10 * layer.searches


def test_a_walk_with_a_capacity(device, dtype):
    steps = 150 if SLOW else 2_000
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=2_000)
    for positions, cell, pbc, system_idx in npt_walk(steps, dtype, device):
        padded = layer(positions, cell, pbc, system_idx).check()
        expected = fresh(positions, cell, pbc, system_idx)
        count = expected.shifts.shape[0]
        assert int(padded.num_pairs) == count
        assert_same_bits((padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]), expected)
        assert (padded.distances[count:] == CUTOFF).all()
    assert layer.searches + layer.reuses == steps
    assert layer.searches > steps / 100 and layer.reuses > 10 * layer.searches


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_twice(name, device, dtype):
    """A search and a reuse: tiny cells, empty systems, no cell, atoms anywhere."""
    system = SYSTEMS[name]
    arguments = system.arguments(dtype, device)
    layer = diffnl.NeighborList(system.cutoffs[0], skin=0.3)
    for _ in range(2):
        assert_same_bits(layer(*arguments), fresh(*arguments, cutoff=system.cutoffs[0]))


# ----- the criterion ---------------------------------------------------------------------------------------


def test_two_atoms_that_meet(device):
    """Head on, each by a little less than half the skin, and then by a little more."""
    start = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64, device=device)
    cell = torch.zeros(3, 3, dtype=torch.float64, device=device)
    towards = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64, device=device)
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    assert layer(start, cell, False).shifts.shape[0] == 0
    assert layer(start + 0.4999 * towards, cell, False).shifts.shape[0] == 0
    assert_counts(layer, 1, 1)
    assert layer(start + 0.5001 * towards, cell, False).shifts.shape[0] == 2
    assert_counts(layer, 2, 1)


def test_a_cell_that_shrinks_brings_atoms_together(device):
    """Each atom keeps its place in the cell: only the strain is left, which counts."""
    cell = tensor(cubic(9.9)).to(device)
    positions = torch.tensor([[0.0, 0.0, 0.0], [4.95, 0.0, 0.0]], dtype=torch.float64, device=device)
    layer = diffnl.NeighborList(CUTOFF, skin=0.9)
    assert layer(positions, cell, True).shifts.shape[0] == 0
    for scale, expected in ((0.9, 0), (0.82, 0), (0.80, 4)):
        assert layer(scale * positions, scale * cell, True).shifts.shape[0] == expected
    assert_counts(layer, 2, 2)


def test_a_uniform_strain_is_no_displacement(box):
    """2 % of a 12 Å box moves atoms by more than half the skin; pairs hardly change."""
    positions, cell = box
    layer = diffnl.NeighborList(CUTOFF, skin=0.3)
    layer(positions, cell, True)
    assert (0.02 * positions).norm(dim=1).max() > 0.15
    assert_same_bits(layer(1.02 * positions, 1.02 * cell, True), fresh(1.02 * positions, 1.02 * cell, True))
    assert_counts(layer, 1, 1)


def test_a_shear_of_the_cell_alone_is_noticed(box):
    """Atoms stay where they are, images do not."""
    positions, cell = box
    layer = diffnl.NeighborList(CUTOFF, skin=0.5)
    layer(positions, cell, True)
    sheared = cell.clone()
    sheared[2] += 2.0
    assert_same_bits(layer(positions, sheared, True), fresh(positions, sheared, True))
    assert_counts(layer, 2, 0)


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_one_system_of_a_batch_is_enough(full, device, dtype, monkeypatch):
    """Each in its turn; on the CPU no other is searched."""
    positions, cell, pbc, system_idx = SYSTEMS["batch_mixed_pbc"].arguments(dtype, device)
    layer = diffnl.NeighborList(3.0, skin=0.5, full=full)
    layer(positions, cell, pbc, system_idx)
    search, searched = diffnl._ops.neighbor_pairs, []

    def watched(*arguments):
        searched.append(len(arguments[0]))
        return search(*arguments)

    systems = system_idx.unique().tolist()
    for count, b in enumerate(systems, start=2):
        own = system_idx == b
        positions[own.nonzero()[-1]] += 0.3
        with monkeypatch.context() as patch:
            patch.setattr(diffnl._ops, "neighbor_pairs", watched)
            found = layer(positions, cell, pbc, system_idx)
        assert_same_bits(found, fresh(positions, cell, pbc, system_idx, cutoff=3.0, full=full))
        assert_counts(layer, count, 0)
        if device.type == "cpu" and not EMULATED:
            assert searched.pop() == int(own.sum()) and not searched
    assert len(systems) > 1
    layer(positions, cell, pbc, system_idx)
    assert_counts(layer, 1 + len(systems), 1)


def test_bad_input_of_a_batch_is_named_by_its_number(device):
    """Not by its number among the systems that are searched."""
    positions, cell, pbc, system_idx = SYSTEMS["batch_mixed_pbc"].arguments(torch.float64, device)
    layer = diffnl.NeighborList(3.0, skin=0.5)
    layer(positions, cell, pbc, system_idx)
    atom = int((system_idx == system_idx.max()).nonzero()[-1])
    positions[atom, 1] = torch.nan
    with pytest.raises(ValueError, match=f"`positions` must be finite; got .* for atom {atom}"):
        layer(positions, cell, pbc, system_idx)


# ----- changes that must be noticed ------------------------------------------------------------------------


def change(kind, positions, cell, pbc, system_idx):
    if kind == "atoms":
        return positions[:-1], cell, pbc, system_idx[:-1]
    if kind == "order":
        return positions.flip(0), cell, pbc, system_idx.flip(0)
    if kind.startswith("pbc"):
        flipped = pbc.clone()
        flipped[1, int(kind[-1])] ^= True
        return positions, cell, flipped, system_idx
    if kind == "system_idx":
        return positions, cell, pbc, (system_idx + 1) % 2
    if kind == "systems":
        return positions, cell[:1], pbc[:1], torch.zeros_like(system_idx)
    if kind == "dtype":
        return positions.to(torch.float32), cell.to(torch.float32), pbc, system_idx


KINDS = ["atoms", "order", "pbc_0", "pbc_1", "pbc_2", "system_idx", "systems", "dtype"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_noticed(kind, device):
    cell = torch.stack([tensor(cubic(8.0)), tensor(cubic(9.0))]).to(device)
    positions = scatter(40, cubic(8.0), 5).to(device)
    system_idx = (torch.arange(40) % 2).to(device)
    pbc = torch.tensor([[True, True, True], [True, False, True]], device=device)
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    layer(positions, cell, pbc, system_idx)
    changed = change(kind, positions, cell, pbc, system_idx)
    assert_same_bits(layer(*changed), fresh(*changed))
    assert_counts(layer, 2, 0)


def test_in_place_changes_are_noticed(box):
    positions, cell = box
    pbc = torch.tensor([True, True, False], device=positions.device)
    layer = diffnl.NeighborList(CUTOFF, skin=0.5)
    layer(positions, cell, pbc)
    positions[7] += 1.0
    assert_same_bits(layer(positions, cell, pbc), fresh(positions, cell, pbc))
    pbc[2] = True
    assert_same_bits(layer(positions, cell, pbc), fresh(positions, cell, pbc))
    cell[1] *= 0.7
    assert_same_bits(layer(positions, cell, pbc), fresh(positions, cell, pbc))
    assert_counts(layer, 4, 0)


@pytest.mark.parametrize(("name", "value"), [("cutoff", 3.0), ("skin", 1.5), ("full", False)])
def test_other_options_are_noticed(name, value, box):
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    layer(*box, True)
    setattr(layer, name, value)
    expected = fresh(*box, True, cutoff=layer.cutoff, full=layer.full)
    assert_same_bits(layer(*box, True), expected)
    assert_counts(layer, 2, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_input_is_an_error_between_reuses(bad, box):
    positions, cell = box
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    good = layer(positions, cell, True)
    for broken in ((positions.clone(), cell), (positions, cell.clone())):
        broken[0 if broken[0] is not positions else 1][1, 1] = bad
        with pytest.raises(ValueError, match="must be finite"):
            layer(*broken, True)
    with pytest.raises(ValueError, match="linearly independent"):
        layer(positions, torch.zeros_like(cell), True)
    assert_equal_bits(layer(positions, cell, True), good)


def test_bad_input_of_a_padded_list_is_nan(box):
    positions, cell = box
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=5_000)
    layer(positions, cell, True).check()
    padded = layer(positions * torch.nan, cell, True)
    assert padded.vectors.isnan().all()
    with pytest.raises(ValueError, match="`positions` must be finite"):
        padded.check()


# ----- what only a GPU runs out of --------------------------------------------------------------------------


def test_candidates_beyond_their_room(device, dtype, gpu_kernels):
    """Four neighbours at 2.35 Å, twelve more at 3.84 Å: more than the same density promises within 3.95 Å."""
    positions, cell, *_ = SYSTEMS["diamond"].arguments(dtype, device)
    needed = 4 * len(positions)
    layer = diffnl.NeighborList(2.5, skin=1.45, capacity=needed)
    padded = layer(positions.requires_grad_(), cell, True)
    if not gpu_kernels:
        assert int(padded.check().num_pairs) == needed
        return
    enough = int(padded.num_pairs)
    assert enough > needed and padded.vectors.isnan().all()
    assert torch.autograd.grad(padded.vectors.sum(), positions)[0].isnan().all()
    with pytest.raises(ValueError, match=f"`capacity` must be at least .* {enough}; got {needed}"):
        padded.check()
    layer.capacity = enough
    for _ in range(2):
        assert int(layer(positions, cell, True).check().num_pairs) == needed
    assert_counts(layer, 2, 1)
    assert enough <= diffnl.estimate_capacity(positions, cell, True, 2.5, skin=1.45, slack=0.0) < enough + 256


def test_candidates_beyond_a_link(device, gpu_kernels):
    """S > 31 fits no link: searched every time, or with a capacity a failure that says what to do."""
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 80.5]], dtype=torch.float64, device=device)
    cell = 2.0 * torch.eye(3, dtype=torch.float64, device=device)
    layer = diffnl.NeighborList(2.1, skin=0.5)
    for _ in range(3):
        assert_same_bits(layer(positions, cell, True), fresh(positions, cell, True, cutoff=2.1))
    assert_counts(layer, 1, 0 if gpu_kernels else 2)
    padded = diffnl.NeighborList(2.1, skin=0.5, capacity=500)(positions, cell, True)
    if gpu_kernels:
        assert padded.vectors.isnan().all()
        with pytest.raises(ValueError, match="spans more than 31 cells .* wrap the positions"):
            padded.check()


@pytest.mark.parametrize(("atoms", "dtype"), [(3_000, torch.float64), (17_000, torch.float32)])
def test_large_systems(atoms, dtype, device):
    """Several launches ask about and select from more than 2,048 atoms, others from more than 16,384."""
    edge = (atoms / 0.02) ** (1 / 3)
    cell = tensor(cubic(edge)).to(device, dtype)
    positions = scatter(atoms, cubic(edge), 4).to(device, dtype)
    capacity = diffnl.estimate_capacity(positions, cell, True, 3.0, skin=0.4)
    layer = diffnl.NeighborList(3.0, skin=0.4)
    padded_layer = diffnl.NeighborList(3.0, skin=0.4, capacity=capacity)
    for step in (0, 1, 4):
        moved = positions + 0.05 * step * torch.cos(positions)
        expected = fresh(moved, cell, True, cutoff=3.0)
        assert_same_bits(layer(moved, cell, True), expected)
        padded = padded_layer(moved, cell, True).check()
        count = int(padded.num_pairs)
        assert_same_bits((padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]), expected)
    assert_counts(layer, 2, 1)
    assert_counts(padded_layer, 2, 1)


# ----- gradients --------------------------------------------------------------------------------------------


def derivatives(find, positions, cell, *rest):
    """First and second ones of an energy that is 0 at the cutoff, as its padding must be."""
    leaves = positions.detach().clone().requires_grad_(), cell.detach().clone().requires_grad_()
    x = find(*leaves, *rest).distances / CUTOFF
    first = torch.autograd.grad((1.0 - x).pow(3).sum(), leaves, create_graph=True)
    return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


@pytest.mark.parametrize("capacity", [None, 6_000], ids=["exact", "padded"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_gradients_are_of_the_live_tensors(full, capacity, box, gpu_kernels):
    """After a step: first and second derivatives of the new positions, not of those that were searched."""
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, full=full, capacity=capacity)
    layer(*box, True)
    moved = box[0] + 0.05 * torch.sin(37.0 * box[0]), 1.003 * box[1], True
    ours = derivatives(layer, *moved)
    assert_counts(layer, 1, 1)
    theirs = derivatives(lambda *a: fresh(*a, full=full), *moved)
    assert_close_sums(ours, theirs)
    assert gpu_kernels or all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("capacity", [None, 4_000], ids=["exact", "padded"])
def test_gradients_do_not_depend_on_the_past(capacity, device, dtype):
    """The same bits whenever the candidates were searched; the systems of the walk are interleaved."""
    young = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=capacity)
    old = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=capacity)
    for step, (positions, cell, *rest) in enumerate(npt_walk(12, dtype, device)):
        ours = derivatives(old, positions, cell, *rest)
        if step % 5 == 4:
            assert all(map(torch.equal, ours, derivatives(young, positions, cell, *rest)))
    assert young.searches == 1 and old.searches == 1 and old.reuses == 11


def test_torch_func_searches(box):
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    energy = lambda r, find: find(r, box[1], True).vectors.pow(4).sum()  # noqa: E731
    ours = torch.func.grad(energy)(box[0], layer)
    assert torch.equal(ours, torch.func.grad(energy)(box[0], fresh))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its tracing
def test_who_traces_gets_a_search(box):
    """What one call has found must not become a constant of a graph."""
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    layer(*box, True)
    traced = make_fx(
        lambda r, h: tuple(layer(r, h, True)), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(*box)
    shrunk = [0.9 * x for x in box]
    assert_same_bits(traced(*shrunk), fresh(*shrunk, True))


def test_forward_mode(box):
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    layer(*box, True)
    tangent = torch.cos(box[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(box[0], tangent)
        ours, theirs = (
            torch.autograd.forward_ad.unpack_dual(find(dual, box[1], True).vectors).tangent
            for find in (layer, fresh)
        )
    assert torch.equal(ours, theirs)
    assert_same_bits(layer(*box, True), fresh(*box, True))


# ----- a layer among others --------------------------------------------------------------------------------


def test_copies_and_pickles_keep_nothing(box):
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    for _ in range(3):
        layer(*box, True)
    assert_counts(layer, 1, 2)
    assert layer.state_dict() == {}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.searches, twin.reuses, twin.skin) == (0, 0, 1.0)
        assert len(pickle.dumps(twin)) == len(pickle.dumps(diffnl.NeighborList(CUTOFF, skin=1.0)))
        assert_same_bits(twin(*box, True), fresh(*box, True))
        assert_counts(twin, 1, 0)


def test_threads_share_a_layer(device):
    """Each with a system of its own: whoever comes last has the candidates, nobody gets another's pairs."""
    layer = diffnl.NeighborList(3.0, skin=0.5)
    systems = [scatter(20 + n, cubic(7.0), n).to(device) for n in range(4)]
    cell = tensor(cubic(7.0)).to(device)
    expected = [fresh(positions, cell, True, cutoff=3.0) for positions in systems]

    def work(n):
        for _ in range(30):
            assert_same_bits(layer(systems[n], cell, True), expected[n])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_threads_do_not_change_a_bit(box, threads):
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    moved = box[0] + 0.01
    results = []
    for count in (1, 2, 3):
        threads(count)
        layer(*box, True)
        results.append(layer(moved, box[1], True))
    assert_equal_bits(results[0], results[1])
    assert_equal_bits(results[0], results[2])


def test_the_layer_shows_its_skin():
    assert "skin=1.0" in repr(diffnl.NeighborList(3.0, skin=1))
    assert "skin" not in repr(diffnl.NeighborList(3.0))


@pytest.mark.parametrize(
    ("skin", "error"),
    [
        (-0.1, ValueError),
        (float("inf"), ValueError),
        (float("nan"), ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_a_skin_that_is_none(skin, error):
    with pytest.raises(error, match="`skin` must be"):
        diffnl.NeighborList(3.0, skin=skin)
