"""`capacity=`: a padded list is the fresh one, its padding harms no model, its failures are never silent."""

import pytest
import torch
from compare import assert_equal_bits, assert_same_bits
from conftest import SLOW
from systems import SYSTEMS
from walks import npt_walk

import diffnl

ROOM = 100


def both(system, dtype, device, cutoff, wanted=True, **options):
    """The fresh list and the padded one, and the leaves they are made of, whose gradients may be wanted."""
    positions, cell, pbc, system_idx = system.arguments(dtype, device)
    leaves = [positions.requires_grad_(wanted)]
    if cell is not None:
        leaves.append(cell.requires_grad_(wanted))
    elif system_idx is not None:
        cell = torch.zeros(int(system_idx.max()) + 1, 3, 3, dtype=dtype, device=device)
    fresh = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, **options)
    capacity = fresh.shifts.shape[0] + ROOM
    layer = diffnl.NeighborList(cutoff, capacity=capacity, **options)
    return fresh, layer(positions, cell, pbc, system_idx), leaves


def assert_padded(padded, fresh, cutoff, num_atoms):
    """The fresh list in front, padding as it is promised behind."""
    count = fresh.shifts.shape[0]
    capacity = count + ROOM
    assert isinstance(padded, tuple) and len(padded) == 4
    assert padded.mapping.shape == (2, capacity) and padded.mapping.dtype == torch.int64
    assert padded.shifts.shape == (capacity, 3) and padded.shifts.dtype == torch.int32
    assert padded.vectors.shape == (capacity, 3) and padded.vectors.dtype == fresh.vectors.dtype
    assert padded.num_pairs.shape == () and int(padded.num_pairs) == count
    assert {tensor.device for tensor in padded} == {fresh.mapping.device}
    assert_same_bits((padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]), fresh)
    assert (padded.mapping[:, count:] == max(num_atoms - 1, 0)).all()
    assert (padded.shifts[count:] == 0).all()
    assert (padded.distances[count:] == cutoff).all(), "exactly, or an envelope would not be 0"
    assert padded.mask[:count].all() and not padded.mask[count:].any()


@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_pairs_are_those_of_a_fresh_list(name, full, in_order, device, dtype):
    system = SYSTEMS[name]
    cutoff = system.cutoffs[0]
    fresh, padded, _ = both(system, dtype, device, cutoff, False, full=full, sorted=in_order)
    assert_padded(padded.check(), fresh, cutoff, len(system.positions))


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_derivatives_are_those_of_a_fresh_list(name, full, device, dtype, gpu_kernels):
    """First and second ones, whatever the model makes of padded slots: here NaN."""
    cutoff = SYSTEMS[name].cutoffs[0]
    fresh, padded, leaves = both(SYSTEMS[name], dtype, device, cutoff, full=full)
    if gpu_kernels and full and len(fresh.shifts) > 0 and fresh.shifts.abs().max() > 31:
        pytest.skip("beyond what a padded list can link: see test_pairs_beyond_a_link")
    assert_padded(padded.check(), fresh, cutoff, len(leaves[0]))
    count = fresh.shifts.shape[0]

    def derivatives(vectors):
        poison = torch.full_like(vectors, torch.nan)
        poison[:count] = 1.0
        energy = (vectors.pow(3) * poison).sum()
        first = torch.autograd.grad(energy, leaves, create_graph=True)
        with torch.no_grad():
            seeds = [torch.cos(torch.arange(x.numel(), device=device)).view_as(x).to(x) for x in first]
        return *first, *torch.autograd.grad(first, leaves, seeds)

    for ours, theirs in zip(derivatives(padded.vectors), derivatives(fresh.vectors), strict=True):
        assert torch.equal(ours, theirs)


def test_tangents_of_padding_are_zero(device, dtype):
    _, padded, (positions, cell) = both(SYSTEMS["diamond"], dtype, device, 3.0)
    _, tangent = torch.func.jvp(
        lambda r: diffnl.neighbor_pairs(r, cell, True, 3.0, capacity=len(padded.shifts)).vectors,
        (positions,),
        (torch.randn_like(positions),),
    )
    count = int(padded.num_pairs)
    assert tangent[:count].abs().max() > 0 and (tangent[count:] == 0).all()


@pytest.mark.parametrize("steps", [100 if SLOW else 2_000])
def test_a_walk_at_constant_pressure(steps, device, dtype):
    layer = diffnl.NeighborList(5.0, capacity=4_000)
    most = 0
    for positions, cell, pbc, system_idx in npt_walk(steps, dtype, device):
        fresh = diffnl.neighbor_pairs(positions, cell, pbc, 5.0, system_idx)
        padded = layer(positions, cell, pbc, system_idx)
        count = int(padded.num_pairs)
        assert_same_bits((padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]), fresh)
        most = max(most, count)
    assert most > 500


# ----- failures ------------------------------------------------------------------------------------------


def leaves(system, dtype, device):
    positions, cell, pbc, system_idx = system.arguments(dtype, device)
    return positions.requires_grad_(), cell.requires_grad_(), pbc, system_idx


def assert_failed(padded, leaves):
    """NaN vectors and derivatives, valid indices, and a mask that hides nothing."""
    assert padded.vectors.isnan().all() and padded.distances.isnan().all()
    assert padded.mask.all()
    assert (padded.mapping >= 0).all() and (padded.mapping < max(len(leaves[0]), 1)).all()
    assert (padded.shifts == 0).all()
    first = torch.autograd.grad(padded.vectors.square().sum(), leaves, create_graph=True)
    assert all(gradient.isnan().all() for gradient in first)
    second = torch.autograd.grad(sum(gradient.sum() for gradient in first), padded.vectors)
    assert second[0].isnan().all()


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("name", ["diamond", "batch"])
def test_overflow(name, full, device, dtype):
    system = SYSTEMS[name]
    cutoff = system.cutoffs[-1]
    positions, cell, pbc, system_idx = leaves(system, dtype, device)
    needed = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=full).shifts.shape[0]
    for capacity in (0, 1, needed - 1):
        layer = diffnl.NeighborList(cutoff, capacity=capacity, full=full)
        padded = layer(positions, cell, pbc, system_idx)
        assert int(padded.num_pairs) == needed
        assert_failed(padded, (positions, cell))
        with pytest.raises(ValueError, match=f"`capacity` must be at least .* {needed}; got {capacity}"):
            padded.check()
    exact = diffnl.NeighborList(cutoff, capacity=needed, full=full)(positions, cell, pbc, system_idx)
    assert exact.check() is exact and exact.mask.all()


def spoil(kind, positions, cell, system_idx):
    with torch.no_grad():
        if kind == "positions":
            positions[3, 1] = torch.nan
        elif kind == "infinite_cell":
            cell[..., 0, 2] = torch.inf
        elif kind == "singular_cell":
            cell[..., 0, :] = cell[..., 1, :]
        elif kind == "system_idx":
            system_idx[2] = -4
        elif kind == "far_apart":
            positions[1] += 1e13


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("kind", ["positions", "infinite_cell", "singular_cell", "system_idx", "far_apart"])
def test_bad_input(kind, full, device, dtype):
    """`check()` raises what the search without a capacity raises, word by word."""
    positions, cell, pbc, system_idx = leaves(SYSTEMS["diamond"], dtype, device)
    if system_idx is None:
        system_idx = torch.zeros(len(positions), dtype=torch.int64, device=device)
    spoil(kind, positions, cell, system_idx)
    with pytest.raises(ValueError) as eager:
        diffnl.neighbor_pairs(positions, cell, pbc, 3.0, system_idx, full=full)
    padded = diffnl.neighbor_pairs(positions, cell, pbc, 3.0, system_idx, full=full, capacity=500)
    assert int(padded.num_pairs) < 0
    assert_failed(padded, (positions, cell))
    with pytest.raises(ValueError) as late:
        padded.check()
    assert str(late.value) == str(eager.value)


def masked_energy(pairs, cutoff):
    """An energy that a failed list does not reach: torch.where takes 0 for what is not below the cutoff."""
    distances = pairs.distances
    return torch.where(distances < cutoff, (1 - distances / cutoff) ** 3, 0.0).sum()


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("fault", ["no room at all", "overflow", "bad input", "none"])
def test_ok_stops_an_energy_that_a_mask_lets_pass(fault, full, device, dtype):
    """Energy, forces, and the gradients of parameters are NaN, though the masked energy is 0."""
    positions, cell, pbc, _ = leaves(SYSTEMS["diamond"], dtype, device)
    if fault == "bad input":
        spoil("positions", positions, cell, None)
    capacity = {"no room at all": 0, "overflow": 10}.get(fault, 2_000)
    pairs = diffnl.NeighborList(5.0, full=full, capacity=capacity)(positions, cell, pbc)
    weight = torch.ones((), dtype=dtype, device=device, requires_grad=True)
    bare = weight * masked_energy(pairs, 5.0)
    energy = bare * pairs.ok
    assert pairs.ok.shape == () and pairs.ok.dtype == dtype and pairs.ok.device == positions.device
    gradients = torch.autograd.grad(energy, (positions, cell, weight))
    if fault == "none":
        assert pairs.ok == 1 and torch.equal(energy, bare)
        assert all(gradient.isfinite().all() for gradient in gradients)
    else:
        assert bare == 0 and pairs.ok.isnan() and energy.isnan()
        assert all(gradient.isnan().all() for gradient in gradients)


def test_ok_of_a_list_that_just_fits(device, dtype):
    positions, cell, pbc, _ = leaves(SYSTEMS["diamond"], dtype, device)
    needed = diffnl.neighbor_pairs(positions, cell, pbc, 3.0).shifts.shape[0]
    found = [
        diffnl.neighbor_pairs(positions, cell, pbc, 3.0, capacity=needed + k).ok.tolist() for k in (-1, 0)
    ]
    assert found[0] != found[0] and found[1] == 1.0


def test_the_layer_recovers(device, dtype):
    positions, cell, pbc, _ = leaves(SYSTEMS["diamond"], dtype, device)
    layer = diffnl.NeighborList(3.0, capacity=500)
    good = layer(positions, cell, pbc)
    bad = layer(positions * torch.nan, cell, pbc)
    assert bad.vectors.isnan().all()
    assert_equal_bits(layer(positions, cell, pbc), good)


def test_pairs_beyond_a_link(device, dtype, gpu_kernels):
    """A GPU's backward cannot hold S > 31: with a gradient such a list fails, without one it is there."""
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 80.5]], dtype=dtype, device=device)
    cell = 2.0 * torch.eye(3, dtype=dtype, device=device)
    fresh = diffnl.neighbor_pairs(positions, cell, True, 2.1)
    assert fresh.shifts.abs().max() > 31
    for wanted in (False, True):
        leaf = positions.clone().requires_grad_(wanted)
        for full in (True, False):
            padded = diffnl.neighbor_pairs(leaf, cell, True, 2.1, full=full, capacity=500)
            if wanted and full and gpu_kernels:
                assert_failed(padded, (leaf,))
                with pytest.raises(ValueError, match="spans more than 31 cells .* wrap the positions"):
                    padded.check()
            else:
                padded.check()


# ----- arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "error", "message"),
    [
        (-1, ValueError, "`capacity` must be >= 0; got -1"),
        (True, TypeError, "`capacity` must be an integer; got True of type bool"),
        (10.0, TypeError, "`capacity` must be an integer; got 10.0 of type float"),
        ("10", TypeError, "`capacity` must be an integer; got '10' of type str"),
    ],
)
def test_a_capacity_that_is_none(capacity, error, message):
    with pytest.raises(error, match=message):
        diffnl.NeighborList(3.0, capacity=capacity)
    with pytest.raises(error, match=message):
        diffnl.neighbor_pairs(torch.zeros(1, 3), None, None, 3.0, capacity=capacity)


def test_open_systems_need_cells(device):
    """How many systems there are would have to be read from the device."""
    positions, index = torch.zeros(2, 3, device=device), torch.tensor([0, 1], device=device)
    with pytest.raises(
        ValueError, match=r"`cell` must be given with `system_idx` where there is a `capacity`"
    ):
        diffnl.neighbor_pairs(positions, None, None, 3.0, index, capacity=5)
    zeros = torch.zeros(2, 3, 3, device=device)
    padded = diffnl.neighbor_pairs(positions, zeros, False, 3.0, index, capacity=5).check()
    assert int(padded.num_pairs) == 0


def test_pbc_without_a_cell_is_found_by_the_search(device):
    flags = torch.ones(3, dtype=torch.bool, device=device)
    padded = diffnl.neighbor_pairs(torch.zeros(2, 3, device=device), None, flags, 3.0, capacity=5)
    assert padded.vectors.isnan().all()
    with pytest.raises(ValueError, match="`cell` must have linearly independent vectors"):
        padded.check()


def test_no_atoms(device, dtype):
    positions = torch.zeros(0, 3, dtype=dtype, device=device, requires_grad=True)
    cell = torch.eye(3, dtype=dtype, device=device, requires_grad=True)
    padded = diffnl.neighbor_pairs(positions, cell, True, 3.0, capacity=7).check()
    assert int(padded.num_pairs) == 0 and (padded.distances == 3.0).all()
    gradients = torch.autograd.grad(padded.vectors.square().sum(), (positions, cell))
    assert gradients[0].shape == (0, 3) and (gradients[1] == 0).all()


def test_the_layer_shows_its_capacity():
    assert "capacity=512" in repr(diffnl.NeighborList(3.0, capacity=512))
    assert "capacity" not in repr(diffnl.NeighborList(3.0))


# ----- choosing ------------------------------------------------------------------------------------------


def test_estimated_capacity_has_room_to_spare(device):
    arguments = SYSTEMS["diamond"].arguments(torch.float64, device)[:3]
    needed = diffnl.neighbor_pairs(*arguments, 5.0).shifts.shape[0]
    estimated = diffnl.estimate_capacity(*arguments, 5.0)
    assert 1.25 * needed <= estimated < 1.25 * needed + 256 and estimated % 256 == 0
    assert needed <= diffnl.estimate_capacity(*arguments, 5.0, slack=0.0) < needed + 256
    half = diffnl.estimate_capacity(*arguments, 5.0, full=False)
    assert 1.25 * needed / 2 <= half < 1.25 * needed / 2 + 256


def test_estimated_capacity_is_for_one_cutoff():
    with pytest.raises(ValueError, match=r"`cutoff` must be one number, for one list; got 2"):
        diffnl.estimate_capacity(torch.zeros(1, 3), None, None, (3.0, 4.0))


def test_estimated_capacity_is_never_nothing():
    assert diffnl.estimate_capacity(torch.zeros(1, 3), None, None, 3.0) == 256


@pytest.mark.parametrize(
    ("slack", "error"),
    [(-0.1, ValueError), (float("nan"), ValueError), ("much", TypeError), (True, TypeError)],
)
def test_a_slack_that_is_none(slack, error):
    with pytest.raises(error, match="`slack` must be"):
        diffnl.estimate_capacity(torch.zeros(1, 3), None, None, 3.0, slack=slack)
