"""What the tests in test_gpu_*.py share: large systems, and the steps that are taken on them."""

import pytest
import torch
from compare import bits
from systems import TRICLINIC, System, cubic, scatter, tensor

import diffnl

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


def leaves_of(arguments):
    """(positions, cell) that require a gradient; a zero cell where there is none."""
    positions, cell, *_ = arguments
    cell = positions.new_zeros(3, 3) if cell is None else cell
    return positions.detach().requires_grad_(), cell.detach().requires_grad_()


def random_like(t, seed):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=t.dtype).to(t.device)


def whole_step(arguments, cutoff, full=True):
    """The list, gradients by positions and cell, and gradients of those: what training computes."""
    _, cell, pbc, system_idx = arguments
    pbc = False if cell is None else pbc
    leaves = leaves_of(arguments)
    mapping, shifts, vectors = find((*leaves, pbc, system_idx), cutoff, full=full)
    first = torch.autograd.grad(vectors.pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
    return mapping, shifts, vectors.detach(), *(g.detach() for g in (*first, *second))
