"""What only a GPU can show, memory: tensors beyond 2³¹ elements, none left, and how much a search takes.

Run without pytest-xdist: no other process should use the GPU meanwhile.
"""

import math
import subprocess
import sys

import pytest
import torch
from compare import bits
from gpu_steps import GB, LARGE, assert_same, whole_step

import diffnl


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
