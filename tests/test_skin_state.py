"""What a layer with a skin keeps belongs to options and shapes, or to one call of a graph."""

import contextlib

import pytest
import torch
from compare import assert_same_bits
from systems import cubic, scatter, tensor
from test_skin_wrapped import fresh, live

import diffnl
from diffnl import _validate
from diffnl.skin import MOST_KEPT

exact_and_padded = pytest.mark.parametrize("capacity", [None, 3_000], ids=["exact", "padded"])


def boxes(count, device):
    """Systems of different numbers of atoms, in one cell."""
    cell = tensor(cubic(7.0)).to(device)
    return [(scatter(20 + n, cubic(7.0), n).to(device), cell) for n in range(count)]


@exact_and_padded
def test_shapes_take_turns(capacity, device):
    """Training and validation: each kept what the other had found only until its next call."""
    layer = diffnl.NeighborList(3.0, skin=0.5, capacity=capacity)
    systems = boxes(2, device)
    for step in range(6):
        for positions, cell in systems:
            moved = positions + 0.01 * step
            assert_same_bits(live(layer(moved, cell, True)), fresh(moved, cell, True, cutoff=3.0))
    assert (layer.searches, layer.reuses) == (2, 10)


@exact_and_padded
def test_the_shape_that_was_used_last_is_kept(capacity, device):
    """One more than are kept: that whose last call is longest ago is searched again, the others are not."""
    layer = diffnl.NeighborList(3.0, skin=0.5, capacity=capacity)
    systems = boxes(MOST_KEPT + 1, device)
    for n in (*range(MOST_KEPT), 0, MOST_KEPT):
        layer(*systems[n], True)
    assert (layer.searches, layer.reuses) == (MOST_KEPT + 1, 1)
    for n in (MOST_KEPT, 0, *range(2, MOST_KEPT)):
        layer(*systems[n], True)
    assert layer.searches == MOST_KEPT + 1
    layer(*systems[1], True)
    assert layer.searches == MOST_KEPT + 2


@exact_and_padded
def test_reset_forgets(capacity, device):
    layer = diffnl.NeighborList(3.0, skin=0.5, capacity=capacity)
    ((positions, cell),) = boxes(1, device)
    for searches in (1, 1, 2):
        if searches == 2:
            layer.reset()
        assert_same_bits(live(layer(positions, cell, True)), fresh(positions, cell, True, cutoff=3.0))
        assert layer.searches == searches


@pytest.fixture
def capturing(device, gpu_kernels, monkeypatch):
    """A context of calls that take a graph to be captured, for kernels that an emulator runs."""
    if not gpu_kernels or device.type != "cpu":
        pytest.skip("only the emulator's kernels can be told that they are captured; see test_gpu_graphs.py")
    monkeypatch.setattr("diffnl.skin._outside_of_capture", contextlib.nullcontext)

    @contextlib.contextmanager
    def capture():
        with monkeypatch.context() as patch:
            patch.setattr(_validate, "is_capturing", lambda device: True)
            yield

    return capture


def test_a_captured_call_has_candidates_of_its_own(capturing, device):
    """It takes over those of an earlier call; no later call, captured or not, gets the same."""
    layer = diffnl.NeighborList(3.0, skin=0.5, capacity=3_000)
    ((positions, cell),) = boxes(1, device)
    layer(positions, cell, True)
    with capturing():
        layer(positions, cell, True)
        assert (layer.searches, layer.reuses) == (1, 1)
        layer(positions, cell, True)
    layer(positions, cell, True)
    layer(positions, cell, True)
    assert (layer.searches, layer.reuses) == (3, 2)
    kept = layer._kept
    rooms = [room.found[0].data_ptr() for room in (*kept._captured, *kept._of_thread.padded)]
    assert len(set(rooms)) == len(rooms) == 3


def test_reset_frees_what_graphs_write(capturing, device):
    layer = diffnl.NeighborList(3.0, skin=0.5, capacity=3_000)
    with capturing():
        for positions, cell in boxes(3, device):
            layer(positions, cell, True)
    assert len(layer._kept._captured) == 3
    layer.reset()
    assert not layer._kept._captured and not layer._kept._of_thread.padded
    assert layer.searches == 3


def test_a_default_device_changes_nothing(device):
    """Two systems of a batch that are searched again without the third, and are numbered anew for that:
    without `device=` all their atoms were in one of them under "meta"."""
    cell = torch.stack([tensor(cubic(edge)) for edge in (6.0, 7.0, 6.5)]).to(device)
    system_idx = (torch.arange(30) % 3).to(device)
    positions = scatter(30, cubic(6.0), 3).to(device)
    layer = diffnl.NeighborList(3.0, skin=0.5)
    padded = diffnl.NeighborList(3.0, skin=0.5, capacity=3_000)
    for step in range(3):
        positions[1::3] += 0.2 * step
        positions[2::3] += 0.2 * step
        expected = fresh(positions, cell, True, system_idx, cutoff=3.0)
        torch.set_default_device("meta")
        try:
            lists = [find(positions, cell, True, system_idx) for find in (layer, padded)]
        finally:
            torch.set_default_device(None)
        for found in lists:
            assert_same_bits(live(found), expected)
