"""What only a GPU can show, order: streams, devices, and that the host waits no more than it must.

Run without pytest-xdist: no other process should use the GPU meanwhile.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import assert_equal_bits, assert_same_bits
from gpu_steps import (
    LARGE,
    LONG,
    assert_same,
    both_lists,
    find,
    leaves_of,
    random_like,
    whole_step,
)
from gpu_waits import waits_of
from systems import cubic, scatter, tensor

import diffnl

# ----- streams ---------------------------------------------------------------------------------------------


def stream_inputs(gpu, seed):
    """Arguments of their own kind for each seed, made on the current stream."""
    return (
        scatter(3_000 + 500 * seed, cubic(31.0 + seed), seed).to(gpu, torch.float32),
        tensor(cubic(31.0 + seed)).to(gpu, torch.float32),
        torch.ones(1, 3, dtype=torch.bool, device=gpu),
        None,
    )


def test_two_streams_at_once(gpu):
    """Different work on each, queued without waiting for the other: the results are those of one stream."""
    inputs = [stream_inputs(gpu, seed) for seed in (1, 2)]
    alone = [whole_step(arguments, 5.0) for arguments in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(gpu) for _ in inputs]
    for _ in range(20):
        results = []
        for stream, arguments in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(whole_step(arguments, 5.0))
        torch.cuda.synchronize()
        for ours, theirs in zip(results, alone, strict=True):
            assert_same(ours, theirs)


def test_backward_on_two_streams_at_once(gpu):
    """Both backwards are queued behind sleeping streams, so that they do run at the same time."""
    inputs = [stream_inputs(gpu, seed) for seed in (1, 2)]
    leaves = [leaves_of(arguments) for arguments in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(gpu) for _ in inputs]
    vectors, expected, results = [], [], []
    for stream, (_, _, pbc, _), (positions, cell) in zip(streams, inputs, leaves, strict=True):
        with torch.cuda.stream(stream):
            vectors.append(diffnl.neighbor_pairs(positions, cell, pbc, 5.0).vectors)
            energy = vectors[-1].pow(3).sum()
            expected.append(torch.autograd.grad(energy, (positions, cell), retain_graph=True))
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG // 20)
    for stream, v, inputs_of_stream in zip(streams, vectors, leaves, strict=True):
        with torch.cuda.stream(stream):
            results.append(torch.autograd.grad(v.pow(3).sum(), inputs_of_stream))
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        assert_same(ours, theirs)


def test_two_threads_with_a_stream_each(gpu):
    inputs = [stream_inputs(gpu, seed) for seed in (1, 2, 3, 4)]
    alone = [whole_step(arguments, 5.0) for arguments in inputs]
    torch.cuda.synchronize()

    def work(n):
        stream = torch.cuda.Stream(gpu)
        with torch.cuda.stream(stream):
            for _ in range(20):
                results = whole_step(inputs[n], 5.0)
                stream.synchronize()
                assert_same(results, alone[n])
        stream.synchronize()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
def test_a_side_stream_does_not_wait_for_the_default_stream(in_order, gpu):
    """Nothing is launched on the default stream: while that is blocked, a side stream finishes its work."""
    side = torch.cuda.Stream(gpu)

    def work():
        positions, cell = leaves
        mapping, shifts, vectors = diffnl.neighbor_pairs(positions, cell, pbc, 5.0, sorted=in_order)
        first = torch.autograd.grad(vectors.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        again = diffnl.pair_vectors(positions, cell, mapping, shifts)
        general = torch.autograd.grad(again.pow(3).sum(), leaves)
        return [t.detach().cpu() for t in (mapping, shifts, vectors, *first, *second, again, *general)]

    with torch.cuda.stream(side):
        positions, cell, pbc, _ = stream_inputs(gpu, 1)
        leaves = positions.requires_grad_(), cell.requires_grad_()
        expected = work()  # also loads the kernels and fills the allocator's pool of this stream
        work()
    torch.cuda.synchronize()

    torch.cuda._sleep(LONG)
    default_stream_is_through = torch.cuda.Event()
    default_stream_is_through.record()
    with torch.cuda.stream(side):
        results = work()
    finished_first = not default_stream_is_through.query()
    torch.cuda.synchronize()
    assert finished_first, "the side stream waited for the default stream"
    assert_same(results, expected)


def test_inputs_still_being_computed_are_waited_for(gpu):
    """The stream orders the search behind what makes its input."""
    positions, cell, pbc, _ = stream_inputs(gpu, 1)
    expected = diffnl.neighbor_pairs(positions, cell, pbc, 5.0)
    late = torch.full_like(positions, math.nan)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG // 20)
    late.copy_(positions)
    assert_same_bits(diffnl.neighbor_pairs(late, cell, pbc, 5.0), expected)


# ----- devices ---------------------------------------------------------------------------------------------


def test_another_device_than_the_current_one(dtype, second_gpu):
    current = torch.cuda.current_device()
    for name in ("bulk", "batch_512x27"):
        system = LARGE[name]
        here = whole_step(system.arguments(dtype, torch.device("cuda", current)), system.cutoffs[0])
        there = whole_step(system.arguments(dtype, second_gpu), system.cutoffs[0])
        assert {t.device for t in there} == {second_gpu}
        assert torch.cuda.current_device() == current
        assert_equal_bits(there, here)


def test_two_devices_from_two_threads(second_gpu):
    devices = [torch.device("cuda", torch.cuda.current_device()), second_gpu]
    expected = [t.cpu() for t in whole_step(LARGE["bulk"].arguments(torch.float32, devices[0]), 5.0)]

    def work(device):
        for _ in range(10):
            results = whole_step(LARGE["bulk"].arguments(torch.float32, device), 5.0)
            assert_same([t.cpu() for t in results], expected)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, devices))


def test_arguments_on_two_devices_are_refused(gpu):
    positions = torch.zeros(2, 3, device=gpu)
    pattern = "`{}` must be on the device of `positions`, cuda:0; got cpu"
    with pytest.raises(ValueError, match=pattern.format("cell")):
        diffnl.neighbor_pairs(positions, torch.eye(3), True, 1.0)
    with pytest.raises(ValueError, match=pattern.format("system_idx")):
        diffnl.neighbor_pairs(positions, None, None, 1.0, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=pattern.format("mapping")):
        diffnl.pair_vectors(positions, None, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, 3).int())


# ----- synchronisation -------------------------------------------------------------------------------------


def returns_before_the_gpu_is_through(function):
    """Whether the host gets through `function` while the GPU is still busy with what was queued before."""
    for _ in range(2):
        function()  # loads its kernels, fills the allocator's pool
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    function()
    answer = not busy.query()
    torch.cuda.synchronize()
    return answer


@pytest.fixture
def batch(gpu):
    """(leaves, pbc, system_idx, mapping, shifts, g) of a batch, on the GPU."""
    arguments = LARGE["batch_512x27"].arguments(torch.float32, gpu)
    _, _, _, system_idx = arguments
    pbc = torch.ones(512, 3, dtype=torch.bool, device=gpu)
    mapping, shifts, vectors = find(arguments, 5.0)
    return leaves_of(arguments), pbc, system_idx, mapping, shifts, random_like(vectors, 14)


def test_a_wait_is_noticed(batch):
    """The check of the next tests can fail: a search has to wait for its number of pairs."""
    (positions, cell), pbc, system_idx, *_, g = batch
    assert not returns_before_the_gpu_is_through(lambda: g.sum().item())
    assert not returns_before_the_gpu_is_through(
        lambda: diffnl.neighbor_pairs(positions, cell, pbc, 5.0, system_idx)
    )


def test_vectors_wait_for_nothing(batch):
    leaves, _, system_idx, mapping, shifts, _ = batch
    assert returns_before_the_gpu_is_through(
        lambda: diffnl.pair_vectors(*leaves, mapping, shifts, system_idx)
    )


@both_lists
@pytest.mark.parametrize("source", ["list", "vectors"])
def test_backward_and_second_backward_wait_for_nothing(source, full, batch):
    leaves, pbc, system_idx, *_ = batch
    mapping, shifts, vectors = diffnl.neighbor_pairs(*leaves, pbc, 5.0, system_idx, full=full)
    if source == "vectors":
        vectors = diffnl.pair_vectors(*leaves, mapping, shifts, system_idx)
    g = random_like(vectors, 14).requires_grad_()

    def backward():
        first = torch.autograd.grad(vectors, leaves, g, create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in first), g)
        torch.autograd.grad(vectors, leaves[0], g, retain_graph=True)

    assert returns_before_the_gpu_is_through(backward)


# torch says so itself, once, in a warning.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_torch_synchronises_nowhere(batch):
    """Neither the Python layer nor torch's operators inside it wait; the search's own wait is not torch's."""
    leaves, pbc, system_idx, mapping, shifts, g = batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            g.sum().item()
        for full in (True, False):
            pairs = diffnl.neighbor_pairs(*leaves, pbc, 5.0, system_idx, full=full)
            first = torch.autograd.grad(pairs.vectors.pow(3).sum(), leaves, create_graph=True)
            torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        vectors = diffnl.pair_vectors(*leaves, mapping, shifts, system_idx)
        first = torch.autograd.grad(vectors.pow(3).sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore")  # what the profiler has to say about itself
@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "with_gradients"])
@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
def test_a_search_waits_once(in_order, wanted, batch):
    (positions, cell), pbc, system_idx, *_, g = batch
    assert waits_of(lambda: g.sum().item()) >= 1, "a wait would go unnoticed"
    layer = diffnl.NeighborList(5.0, sorted=in_order)
    with torch.set_grad_enabled(wanted):
        assert waits_of(lambda: layer(positions, cell, pbc, system_idx)) <= 1
