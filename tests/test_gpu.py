"""What only a GPU can show: the CPU's bits at size, repeats, streams, devices, synchronisation, memory.

The rest of the suite runs on a GPU too, through its `device` fixture. Tests here fill the memory of the GPU
and watch its streams: no other process should use it meanwhile, so run this file without pytest-xdist.
"""

import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import assert_adjoint, assert_equal_bits, assert_same_bits, bits, order
from systems import SYSTEMS, TRICLINIC, System, cubic, scatter, tensor

import diffnl

named = pytest.mark.parametrize("name", SYSTEMS)
both_lists = pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
ALL = (True, True, True)
GB = 10**9
# Clock cycles, a second or more: far longer than the host takes to queue what a test queues behind it.
LONG = 4_000_000_000


def find(arguments, cutoff, **options):
    positions, cell, pbc, system_idx = arguments
    return diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, **options)


def assert_same(ours, theirs):
    """Two sequences of tensors on one device are equal bit by bit."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))


# ----- the bits of the CPU ---------------------------------------------------------------------------------


def large():
    """Systems at which the oracle would take too long: the CPU backend stands in for it."""
    box = cubic(46.0)
    yield System("bulk", scatter(10_000, box, 1), tensor(box), ALL, (5.0,))
    yield System("bulk_scattered", scatter(6_000, box, 2, -40.0, 40.0), tensor(box), ALL, (5.0,))
    leaning = [[8.0 * x for x in row] for row in TRICLINIC]
    yield System("leaning", scatter(6_000, leaning, 3), tensor(leaning), (True, False, True), (5.0,))
    yield System("open", scatter(8_000, cubic(43.0), 4), None, None, (5.0,))
    slab = [[100.0, 0.0, 0.0], [10.0, 90.0, 0.0], [0.0, 0.0, 3.0]]
    yield System("slab", scatter(3_000, slab, 5), tensor(slab), ALL, (5.0,))
    yield System("tiny_cell", scatter(3, cubic(1.1), 6), tensor(cubic(1.1)), ALL, (9.0,))
    # Bins of more than a thousand atoms next to bins of a few.
    clumps = torch.cat(
        [scatter(1_100, cubic(1.5), 7), scatter(150, cubic(0.5), 8) + 20.0, scatter(900, box, 9)]
    )
    yield System("clumps", clumps, tensor(box), ALL, (1.7,))
    yield System("coincident", torch.ones(200, 3, dtype=torch.float64), tensor(cubic(3.0)), ALL, (3.5,))
    yield _batch("batch_512x27", torch.full((512,), 27), 6.5, 5.0)
    counts = torch.tensor([0, 1, 3_000, 3, 0] + [0, 2, 40, 1] * 60)
    yield _batch("sizes_very_different", counts, 6.0, 5.0)
    yield _batch("systems_5000", torch.arange(5_000) % 3, 3.0, 3.0)


def _batch(name, counts, edge, cutoff):
    """Interleaved systems of `counts` atoms in cells that grow with them."""
    edges = edge * (counts.double() / 27).clamp(min=0.1).pow(1 / 3)
    generator = torch.Generator().manual_seed(10)
    cells = edges[:, None, None] * torch.eye(3, dtype=torch.float64)
    cells = cells + 0.1 * edges[:, None, None] * torch.randn(
        len(counts), 3, 3, generator=generator, dtype=torch.float64
    )
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    fractions = 3.0 * torch.rand(len(owner), 1, 3, generator=generator, dtype=torch.float64) - 1.0
    return System(name, (fractions @ cells[owner]).squeeze(1), cells, ALL, (cutoff,), owner)


LARGE = {system.name: system for system in large()}
sizeable = pytest.mark.parametrize("name", LARGE)


def assert_list_of_the_cpu(system, cutoff, dtype, full, gpu):
    expected = find(system.arguments(dtype, "cpu"), cutoff, full=full, sorted=True)
    arguments = system.arguments(dtype, gpu)
    in_order = find(arguments, cutoff, full=full, sorted=True)
    assert in_order.vectors.is_cuda
    assert_same_bits(in_order, expected)
    mapping, shifts, vectors = find(arguments, cutoff, full=full)
    assert (mapping[0].diff() >= 0).all()
    permutation = order(mapping, shifts)
    assert_same([mapping[:, permutation], shifts[permutation], vectors[permutation]], in_order)
    return expected


@named
@both_lists
def test_list_is_that_of_the_cpu(name, full, dtype, gpu):
    for cutoff in SYSTEMS[name].cutoffs:
        assert_list_of_the_cpu(SYSTEMS[name], cutoff, dtype, full, gpu)


@sizeable
@both_lists
def test_large_list_is_that_of_the_cpu(name, full, dtype, gpu):
    pairs = assert_list_of_the_cpu(LARGE[name], LARGE[name].cutoffs[0], dtype, full, gpu)
    assert pairs.mapping.shape[1] > 1000


@sizeable
def test_vectors_of_a_list_are_those_of_the_cpu(name, dtype, gpu):
    positions, cell, pbc, system_idx = here = LARGE[name].arguments(dtype, "cpu")
    mapping, shifts, expected = find(here, LARGE[name].cutoffs[0])
    cell = positions.new_zeros(3, 3) if cell is None else cell
    there = [None if t is None else t.to(gpu) for t in (positions, cell, mapping, shifts, system_idx)]
    assert_equal_bits([diffnl.pair_vectors(*there)], [expected])
    # An int64 cell shift and an int32 mapping are the same list.
    there[2], there[3] = there[2].int(), there[3].long()
    assert_equal_bits([diffnl.pair_vectors(*there)], [expected])


def leaves_of(arguments):
    """(positions, cell) that require a gradient; a zero cell where there is none."""
    positions, cell, *_ = arguments
    cell = positions.new_zeros(3, 3) if cell is None else cell
    return positions.detach().requires_grad_(), cell.detach().requires_grad_()


def random_like(t, seed):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=t.dtype).to(t.device)


@sizeable
@both_lists
@pytest.mark.parametrize("source", ["list", "vectors"])
def test_adjoint_is_its_formula_and_the_cpus(source, name, full, dtype, gpu):
    """Against sums in float64 within rounding; the CPU's are held to the same bound."""
    arguments = LARGE[name].arguments(dtype, gpu)
    _, _, pbc, system_idx = arguments
    positions, cell = leaves = leaves_of(arguments)
    mapping, shifts, vectors = find(
        (*leaves, pbc, system_idx), LARGE[name].cutoffs[0], full=full, sorted=True
    )
    if source == "vectors":
        shuffled = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(11)).to(gpu)
        mapping, shifts = mapping[:, shuffled], shifts[shuffled]
        vectors = diffnl.pair_vectors(positions, cell, mapping, shifts, system_idx)
    g = random_like(vectors, 12)
    gradients = torch.autograd.grad(vectors, leaves, g)
    sizes = len(positions), cell.numel() // 9
    assert_adjoint(gradients, g, mapping, shifts, system_idx, *sizes)

    leaves = [t.detach().cpu().requires_grad_() for t in leaves]
    mapping, shifts, g = mapping.cpu(), shifts.cpu(), g.cpu()
    system_idx = None if system_idx is None else system_idx.cpu()
    vectors = diffnl.pair_vectors(*leaves, mapping, shifts, system_idx)
    on_the_cpu = torch.autograd.grad(vectors, leaves, g)
    assert_adjoint(on_the_cpu, g, mapping, shifts, system_idx, *sizes)


# ----- the same bits again ---------------------------------------------------------------------------------


def whole_step(arguments, cutoff, full=True):
    """The list, gradients by positions and cell, and gradients of those: what training computes."""
    _, _, pbc, system_idx = arguments
    leaves = leaves_of(arguments)
    mapping, shifts, vectors = find((*leaves, pbc, system_idx), cutoff, full=full)
    first = torch.autograd.grad(vectors.pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
    return mapping, shifts, vectors.detach(), *(g.detach() for g in (*first, *second))


def poison(gpu):
    """Leaves NaN in the memory that the next calls get: nothing may depend on what was there before."""
    for size in (2**10, 2**16, 2**20, 2**24):
        torch.full((size,), math.nan, device=gpu)


@both_lists
@pytest.mark.parametrize("name", ["bulk", "sizes_very_different", "clumps"])
def test_a_hundred_repeats_have_the_same_bits(name, full, dtype, gpu):
    arguments = LARGE[name].arguments(dtype, gpu)
    expected = whole_step(arguments, LARGE[name].cutoffs[0], full)
    for _ in range(100):
        poison(gpu)
        assert_same(whole_step(arguments, LARGE[name].cutoffs[0], full), expected)


def test_a_hundred_repeats_of_vectors_of_a_list_have_the_same_bits(dtype, gpu):
    """The caller's own list, in any order."""
    arguments = LARGE["batch_512x27"].arguments(dtype, gpu)
    mapping, shifts, _ = find(arguments, 5.0)
    shuffled = torch.randperm(len(shifts), generator=torch.Generator().manual_seed(13)).to(gpu)
    mapping, shifts = mapping[:, shuffled], shifts[shuffled]
    leaves = leaves_of(arguments)

    def gradients():
        vectors = diffnl.pair_vectors(*leaves, mapping, shifts, arguments[3])
        return torch.autograd.grad(vectors.pow(3).sum(), leaves)

    expected = gradients()
    for _ in range(100):
        poison(gpu)
        assert_same(gradients(), expected)


def test_repeats_of_forces_and_stress_have_the_same_bits(dtype, gpu):
    arguments = LARGE["batch_512x27"].arguments(dtype, gpu)
    _, _, pbc, system_idx = arguments

    def forces_and_stress():
        positions, cell = leaves = leaves_of(arguments)
        energy = find((*leaves, pbc, system_idx), 5.0).distances.sin().sum()
        return diffnl.forces_and_stress(energy, positions, cell, system_idx)

    expected = forces_and_stress()
    for _ in range(20):
        poison(gpu)
        assert_same(forces_and_stress(), expected)


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


WAITS = re.compile(r"(cuda|hip)(StreamSynchronize|EventSynchronize|DeviceSynchronize|Memcpy|MemcpyDtoH)")
LAUNCHES = re.compile(r"(cuda|hip)\w*Launch\w*Kernel\w*")


def events(function, count):
    """Names of the runtime's calls, and of copies, while `function` runs `count` times."""
    function()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(count):
            function()
    return [event.name for event in profile.events()]


def waits_of(function):
    """How often the host waits in one call; the profiler's own waits cancel."""
    counts = []
    for count in (2, 12):
        names = events(function, count)
        if not any(LAUNCHES.fullmatch(name) for name in names):
            pytest.skip("the profiler sees no calls of the GPU's runtime here")
        counts.append(
            sum(WAITS.fullmatch(name) is not None for name in names)
            # A copy to memory that is not page-locked makes the host wait, whatever its name.
            + sum("Memcpy DtoH" in name and "Pageable" in name for name in names)
        )
    return (counts[1] - counts[0]) / 10


@pytest.mark.filterwarnings("ignore")  # what the profiler has to say about itself
@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "with_gradients"])
@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
def test_a_search_waits_once(in_order, wanted, batch):
    (positions, cell), pbc, system_idx, *_, g = batch
    assert waits_of(lambda: g.sum().item()) >= 1, "a wait would go unnoticed"
    layer = diffnl.NeighborList(5.0, sorted=in_order)
    with torch.set_grad_enabled(wanted):
        assert waits_of(lambda: layer(positions, cell, pbc, system_idx)) <= 1


# ----- memory ----------------------------------------------------------------------------------------------


def needs_free(gigabytes):
    """Skips the test where the GPU has less free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * GB:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory; there are {free / GB:.0f}")


def lattice_points(largest_squared):
    """(M, 3) integer points n with 0 < n^2 <= largest_squared, in lexicographic order."""
    side = torch.arange(-math.isqrt(largest_squared), math.isqrt(largest_squared) + 1)
    points = torch.cartesian_prod(side, side, side)
    squared = points.square().sum(1)
    return points[(squared > 0) & (squared <= largest_squared)]


EDGE = 200  # atoms along each axis of a simple cubic lattice of spacing 1
SQUARED = 8  # the cutoff is sqrt(8.5): 92 neighbours


@pytest.fixture(scope="module")
def huge():
    """8e6 atoms on a lattice, float32, with a list of 7.4e8 pairs: 3 P > 2**31. None of it is rounded."""
    needs_free(60)
    side = torch.arange(EDGE, dtype=torch.float32, device="cuda")
    positions = torch.cartesian_prod(side, side, side).requires_grad_()
    cell = (EDGE * torch.eye(3, device="cuda")).requires_grad_()
    return positions, cell, diffnl.neighbor_pairs(positions, cell, True, math.sqrt(SQUARED + 0.5))


@pytest.fixture
def huge_list(gpu, request):
    """`huge`, asked for only where there is a GPU."""
    return request.getfixturevalue("huge")


def test_every_pair_of_a_huge_list(huge_list):
    """Row by row: atom i, its 92 vectors in any order, and the atoms and shifts that these lead to."""
    positions, _, (mapping, shifts, vectors) = huge_list
    positions, vectors = positions.detach(), vectors.detach()
    neighbours = lattice_points(SQUARED).to(mapping.device)
    atoms, each = EDGE**3, len(neighbours)
    assert each == 92 and mapping.shape == (2, atoms * each) and 3 * atoms * each > 2**31
    expected = numbered(neighbours)
    block = 400_000
    assert atoms % block == 0
    for first in range(0, atoms, block):
        rows = slice(first * each, (first + block) * each)
        i = torch.arange(first, first + block, device=mapping.device)
        assert torch.equal(mapping[0, rows].view(block, each), i[:, None].expand(block, each))
        v = vectors[rows].view(block, each, 3)
        steps = v.long()
        assert torch.equal(steps.to(v.dtype), v)
        assert torch.equal(numbered(steps).sort(1).values, expected.expand(block, each))
        target = positions[first : first + block, None].long() + steps
        cells_away = target.div(EDGE, rounding_mode="floor")
        assert torch.equal(cells_away.int(), shifts[rows].view(block, each, 3))
        x, y, z = (target - EDGE * cells_away).unbind(-1)
        assert torch.equal((x * EDGE + y) * EDGE + z, mapping[1, rows].view(block, each))


def numbered(points):
    """Integer points (..., 3), components at most 3 in magnitude, as numbers in lexicographic order."""
    x, y, z = (points + 3).unbind(-1)
    return (x * 7 + y) * 7 + z


def weights_of_atoms(gpu):
    """(N, 3) small whole numbers, so that every sum below is exact in float32."""
    generator = torch.Generator(device=gpu).manual_seed(15)
    return torch.randint(-3, 4, (EDGE**3, 3), generator=generator, device=gpu).float()


def expected_gradients(weights):
    """Of sum_p g_p v_p with g_p = w_i: by shifting the lattice onto its neighbours."""
    grid = weights.view(EDGE, EDGE, EDGE, 3)
    grad_positions = torch.zeros_like(grid)
    grad_cell = torch.zeros(3, 3, dtype=torch.float64, device=weights.device)
    neighbours = lattice_points(SQUARED).tolist()
    for n in neighbours:
        # i at x has its neighbour at x + n: there arrives w_i.
        grad_positions += torch.roll(grid, n, dims=(0, 1, 2)) - grid
        for axis, step in enumerate(n):
            if step == 0:
                continue
            # Those that leave the box, upwards (S = 1) or downwards (S = -1).
            leaving = grid.narrow(axis, EDGE - step, step) if step > 0 else grid.narrow(axis, 0, -step)
            grad_cell[axis] += math.copysign(1, step) * leaving.double().sum(dim=(0, 1, 2))
    return grad_positions.view(-1, 3), grad_cell.float()


def test_gradients_of_a_huge_list(huge_list, gpu):
    """float32 sums of small whole numbers: equal to the last bit."""
    positions, cell, (mapping, _, vectors) = huge_list
    weights = weights_of_atoms(gpu)
    g = weights[mapping[0]]
    gradients = torch.autograd.grad(vectors, (positions, cell), g, retain_graph=True)
    del g
    for ours, theirs in zip(gradients, expected_gradients(weights), strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_of_the_sum_of_a_huge_list_is_zero(huge_list):
    positions, _, (_, _, vectors) = huge_list
    needs_free(20)
    (gradient,) = torch.autograd.grad(vectors.sum(), positions, retain_graph=True)
    assert not gradient.any()


def test_vectors_of_a_huge_list(huge_list):
    positions, cell, (mapping, shifts, vectors) = huge_list
    needs_free(20)
    with torch.no_grad():
        again = diffnl.pair_vectors(positions, cell, mapping, shifts)
        for first in range(0, len(again), 2**26):
            rows = slice(first, first + 2**26)
            assert torch.equal(bits(again[rows]), bits(vectors[rows]))


def test_gradients_of_the_vectors_of_a_huge_list(huge_list, gpu):
    """A list handed in takes the adjoint of lists in any order."""
    positions, cell, (mapping, shifts, _) = huge_list
    needs_free(80)
    weights = weights_of_atoms(gpu)
    vectors = diffnl.pair_vectors(positions, cell, mapping, shifts)
    g = weights[mapping[0]]
    gradients = torch.autograd.grad(vectors, (positions, cell), g)
    del vectors, g
    for ours, theirs in zip(gradients, expected_gradients(weights), strict=True):
        assert torch.equal(ours, theirs)


WRONG_UNIT = """
import sys, torch, diffnl
generator = torch.Generator().manual_seed(16)
positions = (22 * torch.rand(1000, 3, generator=generator)).cuda()
cell = 22 * torch.eye(3, device="cuda")
before = diffnl.neighbor_pairs(positions, cell, True, 5.0)
many, small = positions, cell
if sys.argv[1] == "tiny_cell":
    many, small = positions[:1], 0.01 * cell
for wanted in (False, True):
    try:
        diffnl.neighbor_pairs(many.detach().requires_grad_(wanted), small, True, 1e4)
    except torch.OutOfMemoryError as error:
        print("refused:", error)
    after = diffnl.neighbor_pairs(positions, cell, True, 5.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
print("state intact")
"""


@pytest.mark.parametrize("case", ["thousand_atoms", "tiny_cell"])
def test_a_cutoff_in_the_wrong_unit(case, gpu):
    """1e14 pairs: the error comes without counting them. In a process of its own, which can be ended."""
    command = [sys.executable, "-c", WRONG_UNIT, case]
    script = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert script.returncode == 0, script.stderr
    assert script.stdout.count("refused:") == 2, script.stdout
    assert script.stdout.endswith("state intact\n")


@pytest.mark.parametrize("limit", ["memory", "allocator"])
@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "with_gradients"])
@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
def test_out_of_memory_leaves_the_next_call_intact(in_order, wanted, limit, gpu):
    """A list of 3 GB where 1 GB is left: of the device, or of what torch's allocator may take."""
    edge, squared = 28, 87
    side = torch.arange(edge, dtype=torch.float32, device=gpu)
    positions = torch.cartesian_prod(side, side, side).requires_grad_(wanted)
    cell = edge * torch.eye(3, device=gpu)
    layer = diffnl.NeighborList(math.sqrt(squared + 0.5), sorted=in_order)
    count = len(positions) * len(lattice_points(squared))
    assert count * 40 > 2.9 * GB
    few = diffnl.neighbor_pairs(positions, cell, True, 1.1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    filler = None
    try:
        if limit == "memory":
            filler = torch.empty(free - GB, dtype=torch.uint8, device=gpu)
        else:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + GB) / total)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                layer(positions, cell, True)
            assert_same(diffnl.neighbor_pairs(positions, cell, True, 1.1), few)
    finally:
        del filler
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert layer(positions, cell, True).mapping.shape == (2, count)


def test_a_sparse_box_allocates_almost_nothing(gpu):
    """A grid over the empty box would take gigabytes."""
    for cell, pbc, edge in ((1e4 * torch.eye(3, device=gpu), True, 1e4), (None, None, 1e6)):
        far = torch.tensor([[1.0, 1.0, 1.0], [edge - 0.5, 1.0, 1.0], [edge / 2] * 3], device=gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        pairs = diffnl.neighbor_pairs(far, cell, pbc, 2.0)
        assert torch.cuda.max_memory_allocated(gpu) - before < 2**24
        assert pairs.mapping.shape[1] == (2 if pbc else 0)


@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "with_gradients"])
def test_peak_memory_of_a_search(wanted, dtype, gpu):
    """The outputs, 8 bytes a pair for the backward, and what the atoms need: no other array of pairs."""
    positions, cell, pbc, _ = LARGE["bulk"].arguments(dtype, gpu)
    positions.requires_grad_(wanted)
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, 12.0)
    peak = torch.cuda.max_memory_allocated(gpu) - before
    written = sum(t.nbytes for t in pairs) + (8 * pairs.mapping.shape[1] if wanted else 0)
    assert peak <= written + 4096 * len(positions)


def test_memory_is_given_back(gpu):
    """A loop of whole steps holds no more after the last than after the first."""
    arguments = LARGE["batch_512x27"].arguments(torch.float32, gpu)
    seen = set()
    for _ in range(5):
        whole_step(arguments, 5.0)
        torch.cuda.synchronize()
        seen.add(torch.cuda.memory_allocated(gpu))
    assert len(seen) == 1
