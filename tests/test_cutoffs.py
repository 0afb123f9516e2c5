"""Several cutoffs: one search, a list for each, each what a search of its own would find."""

import pytest
import torch
from compare import assert_close_sums, assert_same_bits, canonical
from systems import SYSTEMS
from torch.fx.experimental.proxy_tensor import make_fx

import diffnl


@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_each_list_is_that_of_its_own_search(name, full, in_order, device, dtype):
    system = SYSTEMS[name]
    positions, cell, pbc, system_idx = system.arguments(dtype, device)
    longest = system.cutoffs[-1]
    cutoffs = (0.7 * longest, longest, 0.4 * longest, longest)
    options = {"full": full, "sorted": in_order}
    found = diffnl.neighbor_pairs(positions, cell, pbc, cutoffs, system_idx, **options)
    assert isinstance(found, tuple) and len(found) == 4
    for pairs, cutoff in zip(found, cutoffs, strict=True):
        assert isinstance(pairs, diffnl.Pairs)
        own = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, **options)
        assert (pairs.mapping[0].diff() >= 0).all()
        if in_order:
            assert_same_bits(pairs, own)
        else:
            assert_same_bits(canonical(pairs), canonical(own))


def test_each_list_is_differentiable_by_itself(device, dtype):
    """A short- and a long-range term: the gradients of their sum are the sums of their gradients."""
    positions, cell, pbc, system_idx = SYSTEMS["batch_mixed_pbc"].arguments(dtype, device)
    leaves = positions.requires_grad_(), cell.requires_grad_()
    layer = diffnl.NeighborList((3.0, 5.0), sorted=True)

    def derivatives(energy):
        first = torch.autograd.grad(energy, leaves, create_graph=True)
        loss = sum(x.square().sum() for x in first)
        return *first, *torch.autograd.grad(loss, leaves, retain_graph=True)

    short, long = layer(positions, cell, pbc, system_idx)
    assert short.shifts.shape[0] < long.shifts.shape[0]
    own = [diffnl.neighbor_pairs(*leaves, pbc, c, system_idx, sorted=True) for c in (3.0, 5.0)]
    ours = derivatives(short.vectors.pow(4).sum() + long.distances.sum())
    theirs = derivatives(own[0].vectors.pow(4).sum() + own[1].distances.sum())
    assert_close_sums(ours, theirs)
    for pairs, alone in zip((short, long), own, strict=True):
        assert_close_sums(derivatives(pairs.vectors.pow(4).sum()), derivatives(alone.vectors.pow(4).sum()))


def test_forward_mode_of_a_shorter_list(device):
    positions, cell, pbc, _ = SYSTEMS["diamond"].arguments(torch.float64, device)
    tangent = torch.cos(positions)

    def vectors(r, cutoff):
        pairs = diffnl.neighbor_pairs(r, cell, pbc, cutoff, sorted=True)
        return (pairs[0] if isinstance(cutoff, tuple) else pairs).vectors

    ours = torch.func.jvp(lambda r: vectors(r, (2.5, 6.0)), (positions,), (tangent,))
    theirs = torch.func.jvp(lambda r: vectors(r, 2.5), (positions,), (tangent,))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its tracing
def test_transforms_and_tracing(device):
    """torch.func and make_fx see what eager mode sees."""
    positions, cell, pbc, _ = SYSTEMS["diamond"].arguments(torch.float64, device)

    def energy(r):
        short, long = diffnl.neighbor_pairs(r, cell, pbc, (2.5, 4.0))
        return (2.5 - short.distances).pow(3).sum() + (4.0 - long.distances).pow(3).sum()

    def gradient(r):
        r = r.detach().requires_grad_()
        return torch.autograd.grad(energy(r), r)[0]

    moved = positions + 0.1 * torch.cos(positions)
    expected = gradient(moved)
    torch.testing.assert_close(torch.func.grad(energy)(moved), expected)
    assert torch.func.hessian(energy)(moved[:4]).isfinite().all()
    traced = make_fx(gradient, tracing_mode="symbolic", _allow_non_fake_inputs=True)(positions)
    torch.testing.assert_close(traced(moved), expected)


def test_a_skin_around_the_longest(device, dtype):
    positions, cell, pbc, _ = SYSTEMS["bulk"].arguments(dtype, device)
    layer = diffnl.NeighborList((2.0, 4.0), skin=0.5)
    for step in range(4):
        moved = positions + 0.05 * step * torch.sin(positions)
        for pairs, cutoff in zip(layer(moved, cell, pbc), (2.0, 4.0), strict=True):
            assert_same_bits(pairs, diffnl.neighbor_pairs(moved, cell, pbc, cutoff, sorted=True))


@pytest.mark.parametrize("several", [[3.0], (3.0,), (2, 3.0)])
def test_a_sequence_gives_a_tuple(several):
    assert len(diffnl.neighbor_pairs(torch.zeros(2, 3), None, None, several)) == len(several)
    assert len(diffnl.NeighborList(several)(torch.zeros(2, 3))) == len(several)


@pytest.mark.parametrize(
    ("cutoff", "error", "message"),
    [
        ((), ValueError, "`cutoff` must be a number or several; got an empty sequence"),
        ((3.0, -1.0), ValueError, "`cutoff` must be finite and > 0; got -1.0"),
        ((3.0, "4"), TypeError, "`cutoff` must be a number; got '4' of type str"),
    ],
)
def test_cutoffs_that_are_none(cutoff, error, message):
    with pytest.raises(error, match=message):
        diffnl.NeighborList(cutoff)
    with pytest.raises(error, match=message):
        diffnl.neighbor_pairs(torch.zeros(2, 3), None, None, cutoff)


def test_several_cutoffs_have_no_capacity():
    with pytest.raises(
        ValueError, match="`capacity` must be None where there are several cutoffs; got 9 for 2"
    ):
        diffnl.NeighborList((3.0, 4.0), capacity=9)
    with pytest.raises(ValueError, match="`capacity` must be None where there are several cutoffs"):
        diffnl.neighbor_pairs(torch.zeros(2, 3), None, None, (3.0, 4.0), capacity=9)
