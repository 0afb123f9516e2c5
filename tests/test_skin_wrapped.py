"""`skin=` while atoms are wrapped into their cells: a jump by lattice vectors is no motion, and the pairs,
bits and gradients are those of a fresh sorted list of the wrapped positions.
"""

import pytest
import torch
from compare import assert_close_sums, assert_same_bits
from conftest import SLOW
from systems import TRICLINIC, cubic, scatter, tensor
from walks import npt_walk, wrap

import diffnl

CUTOFF = 4.0
SKIN = 1.0
STEPS, SIZE = (20, 0.04) if SLOW else (60, 0.02)

# Name: (cell, pbc, atoms). The thin cell is thinner than atoms move between two searches.
BOXES = {
    "cubic": (cubic(9.0), (True, True, True), 40),
    "triclinic": ([[1.4 * x for x in row] for row in TRICLINIC], (True, True, True), 30),
    "left_handed": ([[0.0, 8.0, 0.0], [7.0, 1.0, 0.0], [1.0, 2.0, 9.0]], (True, True, True), 30),
    "slab": ([[8.0, 0.0, 0.0], [3.0, 7.0, 0.0], [0.0, 0.0, 0.0]], (True, True, False), 30),
    "wire": ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 6.0]], (False, False, True), 20),
    "thin": ([[0.4, 0.0, 0.0], [0.1, 9.0, 0.0], [0.0, 0.0, 9.0]], (True, True, True), 3),
}
# Slow machinery walks in those that differ most.
boxes = pytest.mark.parametrize("name", ["triclinic", "slab", "thin"] if SLOW else BOXES)
both_lists = pytest.mark.parametrize("full", [True, False], ids=["full", "half"])


def fresh(positions, cell, pbc, system_idx=None, cutoff=CUTOFF, **options):
    return diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, sorted=True, **options)


def live(pairs):
    """The pairs of a list, without the padding it may have."""
    if isinstance(pairs, diffnl.Pairs):
        return pairs
    count = int(pairs.check().num_pairs)
    return pairs.mapping[:, :count], pairs.shifts[:count], pairs.vectors[:count]


def box_walk(name, steps, dtype, device, origin=0.0, size=0.02, breathing=0.003, seed=3):
    """Yields (unwrapped, wrapped, cell, pbc) of a box whose cell breathes, atoms with it. Made in float64."""
    rows, pbc, atoms = BOXES[name]
    generator = torch.Generator().manual_seed(seed)
    cell, positions = tensor(rows), scatter(atoms, rows, seed) + origin
    if not all(pbc):
        positions = positions + 3.0 * torch.randn(atoms, 3, generator=generator, dtype=torch.float64)
    velocity = size * torch.randn(atoms, 3, generator=generator, dtype=torch.float64)
    for step in range(steps):
        scale = 1.0 + breathing * torch.sin(torch.tensor(0.3 * step, dtype=torch.float64))
        now = origin + scale * (positions + step * velocity - origin), scale * cell
        yield (
            now[0].to(device, dtype),
            wrap(*now, pbc, origin=origin).to(device, dtype),
            now[1].to(device, dtype),
            pbc,
        )


def jumps_between(steps):
    """How many atoms jump by more than an atom could move, from each step to the next."""
    steps = [step[1] for step in steps]
    return sum(int(((b - a).norm(dim=1) > 0.3).sum()) for a, b in zip(steps, steps[1:], strict=False))


@boxes
def test_wrapping_causes_no_search(name, device, dtype):
    """39 searches in 60 steps where the unwrapped positions needed 5."""
    steps = list(box_walk(name, STEPS, dtype, device, size=SIZE))
    layers = [diffnl.NeighborList(CUTOFF, skin=SKIN) for _ in range(2)]
    assert jumps_between(steps) > 0
    for unwrapped, wrapped, cell, pbc in steps:
        assert_same_bits(layers[0](unwrapped, cell, pbc), fresh(unwrapped, cell, pbc))
        assert_same_bits(layers[1](wrapped, cell, pbc), fresh(wrapped, cell, pbc))
    assert layers[1].searches == layers[0].searches < STEPS / 2


@both_lists
@boxes
def test_a_padded_list_of_wrapped_positions(name, full, device, dtype):
    """With a capacity a GPU decides by itself."""
    steps = list(box_walk(name, STEPS, dtype, device, size=SIZE))
    capacity = 4_000 if name == "thin" else 3_000
    layers = [diffnl.NeighborList(CUTOFF, skin=SKIN, full=full, capacity=capacity) for _ in range(2)]
    for unwrapped, wrapped, cell, pbc in steps:
        layers[0](unwrapped, cell, pbc)
        assert_same_bits(live(layers[1](wrapped, cell, pbc)), fresh(wrapped, cell, pbc, full=full))
    assert layers[1].searches == layers[0].searches < STEPS / 2


@pytest.mark.parametrize("capacity", [None, 2_000], ids=["exact", "padded"])
@both_lists
def test_a_batch_at_constant_pressure(full, capacity, device, dtype):
    """Five interleaved systems with mixed pbc, one of them empty, each in its own breathing cell."""
    layers = [diffnl.NeighborList(CUTOFF, skin=SKIN, full=full, capacity=capacity) for _ in range(2)]
    jumped, before = 0, None
    for positions, cell, pbc, system_idx in npt_walk(40 if SLOW else 400, torch.float64):
        wrapped = wrap(positions, cell, pbc, system_idx)
        jumped += 0 if before is None else int(((wrapped - before).norm(dim=1) > 1.0).sum())
        before = wrapped
        rest = cell.to(device, dtype), pbc.to(device), system_idx.to(device)
        layers[0](positions.to(device, dtype), *rest)
        wrapped = wrapped.to(device, dtype)
        assert_same_bits(live(layers[1](wrapped, *rest)), fresh(wrapped, *rest, full=full))
    assert jumped > 10
    assert layers[1].searches <= 1.1 * layers[0].searches < layers[1].reuses


@both_lists
@boxes
def test_jumps_of_several_cells(name, full, device, dtype):
    """Every atom, to and fro, by up to three cells an axis: only the open axes keep it where it is."""
    generator = torch.Generator().manual_seed(4)
    layer = diffnl.NeighborList((CUTOFF, 2.5), skin=SKIN, full=full)
    for _, wrapped, cell, pbc in box_walk(name, 8, torch.float64, "cpu", size=0.01):
        cells = torch.randint(-3, 4, wrapped.shape, generator=generator) * torch.tensor(pbc)
        jumped = (wrapped + cells.double() @ cell).to(device, dtype)
        cell = cell.to(device, dtype)
        for ours, cutoff in zip(layer(jumped, cell, pbc), (CUTOFF, 2.5), strict=True):
            assert_same_bits(ours, fresh(jumped, cell, pbc, cutoff=cutoff, full=full))
    assert (layer.searches, layer.reuses) == (1, 7)


def test_open_axes_do_not_jump(device):
    """Atoms that leave through an open face and come in on the other side have moved."""
    cell = tensor(cubic(6.0)).to(device)
    positions = scatter(20, cubic(6.0), 2).to(device)
    layer = diffnl.NeighborList(CUTOFF, skin=SKIN)
    layer(positions, cell, (True, False, True))
    for axis, searches in ((0, 1), (2, 1), (1, 2)):
        jumped = positions.clone()
        jumped[3] += cell[axis]
        pbc = (True, False, True)
        assert_same_bits(layer(jumped, cell, pbc), fresh(jumped, cell, pbc))
        assert layer.searches == searches


def test_a_jump_too_far_is_a_search(device, dtype):
    """Beyond 127 cells, which is what is kept of a jump."""
    cell = tensor(cubic(5.0)).to(device, dtype)
    positions = scatter(20, cubic(5.0), 2).to(device, dtype)
    layer = diffnl.NeighborList(CUTOFF, skin=SKIN)
    for cells, reuses in ((0, 0), (-20, 1), (130, 1), (-127, 1)):
        jumped = positions.clone()
        jumped[3, 1] += 5.0 * cells
        assert_same_bits(layer(jumped, cell, True), fresh(jumped, cell, True))
        assert layer.reuses == reuses


def test_shifts_that_fit_no_link(device, gpu_kernels):
    """After a jump |S| > 31: a search, or with a capacity the failure of a fresh list, and no wrong shift."""
    start = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64, device=device)
    far = start + 2.0 * torch.tensor([[0.0, 0.0, -20.0], [0.0, 0.0, 20.0]]).to(start)
    cell = 2.0 * torch.eye(3, dtype=torch.float64, device=device)
    exact = diffnl.NeighborList(2.1, skin=0.5)
    padded = diffnl.NeighborList(2.1, skin=0.5, capacity=500)
    for positions in (start, far, start):
        leaf = positions.clone().requires_grad_()
        assert_same_bits(exact(leaf, cell, True), fresh(leaf, cell, True, cutoff=2.1))
        found = padded(leaf, cell, True)
        if positions is far and gpu_kernels:
            assert found.vectors.isnan().all()
            with pytest.raises(ValueError, match="spans more than 31 cells .* wrap the positions"):
                found.check()
        else:
            assert_same_bits(live(found), fresh(positions, cell, True, cutoff=2.1))


def test_images_too_far_apart_to_number(device):
    """On the CPU a box of all images of a jump would be larger than the list."""
    cell = tensor(cubic(3.0)).to(device)
    positions = scatter(6, cubic(3.0), 5).to(device)
    layer = diffnl.NeighborList(CUTOFF, skin=SKIN)
    layer(positions, cell, True)
    jumped = positions.clone()
    jumped[0] += 90.0
    jumped[1] -= 90.0
    assert_same_bits(layer(jumped, cell, True), fresh(jumped, cell, True))


def test_one_system_is_searched_while_another_has_jumped(device, dtype):
    """The jumps of the systems that keep their candidates go on to count."""
    cell = torch.stack([tensor(cubic(6.0)), tensor(cubic(7.0)), tensor(TRICLINIC)]).to(device, dtype)
    system_idx = (torch.arange(45) % 3).to(device)
    positions = torch.einsum("nk,nkc->nc", scatter(45, cubic(1.0), 7).to(device, dtype), cell[system_idx])
    layer = diffnl.NeighborList(CUTOFF, skin=SKIN)
    layer(positions, cell, True, system_idx)
    positions[::3] += cell[0, 1]
    positions[0] -= 2.0 * cell[0, 0]
    for step in range(1, 4):
        positions[1] += 0.6 if step == 1 else 0.01
        positions[4] += cell[1, 2]
        ours = layer(positions, cell, True, system_idx)
        assert_same_bits(ours, fresh(positions, cell, True, system_idx))
    assert (layer.searches, layer.reuses) == (2, 2)


@pytest.mark.parametrize("capacity", [None, 3_000], ids=["exact", "padded"])
@both_lists
def test_gradients_of_wrapped_positions(full, capacity, device, dtype, gpu_kernels):
    """First and second derivatives; on a GPU through links whose shifts have changed."""
    old, young = (diffnl.NeighborList(CUTOFF, skin=SKIN, full=full, capacity=capacity) for _ in range(2))
    for step, (_, wrapped, cell, pbc) in enumerate(box_walk("triclinic", 12, dtype, device, size=0.03)):
        ours = derivatives(old, wrapped, cell, pbc)
        if step % 4 == 3:
            theirs = derivatives(lambda *a: fresh(*a, full=full), wrapped, cell, pbc)
            assert_close_sums(ours, theirs)
            assert gpu_kernels or all(map(torch.equal, ours, theirs))
        if step == 11:
            assert all(map(torch.equal, ours, derivatives(young, wrapped, cell, pbc)))
    assert old.reuses > old.searches


def derivatives(find, positions, cell, *rest):
    leaves = positions.detach().clone().requires_grad_(), cell.detach().clone().requires_grad_()
    x = find(*leaves, *rest).distances / CUTOFF
    first = torch.autograd.grad((1.0 - x).pow(3).sum(), leaves, create_graph=True)
    return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


@pytest.mark.parametrize("origin", [1e4, 1e7])
@boxes
def test_far_from_the_origin(name, origin, device, dtype):
    """Atoms of float32 jump by 1 Å at 1e7 Å, and the list is right: r_j - r_i and S h are rounded, not r."""
    steps = 8 if SLOW else 15
    layer = diffnl.NeighborList(CUTOFF, skin=SKIN)
    for breathing in (0.0, 0.003):
        for _, wrapped, cell, pbc in box_walk(name, steps, dtype, device, origin, breathing=breathing):
            oracle = diffnl.reference.neighbor_pairs(wrapped.cpu(), cell.cpu(), pbc, CUTOFF, sorted=True)
            assert_same_bits(layer(wrapped, cell, pbc), oracle)
        # A cell that breathes takes atoms far out with it, unless they are wrapped back.
        assert breathing > 0 or origin * torch.finfo(dtype).eps > 0.01 or layer.searches < 5


def test_bad_input_after_a_jump(device):
    positions, cell = scatter(20, cubic(6.0), 2).to(device), tensor(cubic(6.0)).to(device)
    layer = diffnl.NeighborList(CUTOFF, skin=SKIN)
    layer(positions, cell, True)
    positions[2] += cell[0]
    layer(positions, cell, True)
    positions[2, 1] = torch.nan
    with pytest.raises(ValueError, match="`positions` must be finite; got .* for atom 2"):
        layer(positions, cell, True)


@pytest.mark.parametrize("atoms", [3_000] if SLOW else [3_000, 17_000])
def test_large_systems(atoms, device):
    """Many blocks measure and select: several launches each."""
    edge = (atoms / 0.02) ** (1 / 3)
    cell = tensor(cubic(edge)).to(device, torch.float32)
    positions = scatter(atoms, cubic(edge), 4)
    capacity = diffnl.estimate_capacity(positions.to(cell), cell, True, 3.0, skin=0.4)
    exact = diffnl.NeighborList(3.0, skin=0.4)
    padded = diffnl.NeighborList(3.0, skin=0.4, capacity=capacity)
    for step in range(3):
        moved = wrap(positions + 0.05 * step * torch.cos(positions), cell.cpu().double(), True).to(cell)
        expected = fresh(moved, cell, True, cutoff=3.0)
        assert_same_bits(exact(moved, cell, True), expected)
        assert_same_bits(live(padded(moved, cell, True)), expected)
    for layer in (exact, padded):
        assert (layer.searches, layer.reuses) == (1, 2)


def test_a_system_jumps_far_while_another_thins_out(device):
    """The jumps are measured against a list that becomes much shorter before they are followed."""
    cell = torch.stack([3.0 * torch.eye(3), 40.0 * torch.eye(3)]).double()
    owner = torch.tensor([0, 0] + [1] * 60)
    spread = torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.cat([torch.tensor([[0.1, 0.1, 0.1], [1.0, 1.0, 1.0]]).double(), 20.0 + spread])
    then = first.clone()
    then[0] += 3.0 * 19.0
    steps = torch.arange(60)
    then[2:] = torch.stack([9.0 * steps % 40, (9 * steps // 40) * 9.0, 0.0 * steps], 1).double()
    layer = diffnl.NeighborList(2.0, skin=1.0)
    cell, owner = cell.to(device), owner.to(device)
    for positions in (first.to(device), then.to(device)):
        pairs = layer(positions, cell, True, owner)
        assert_same_bits(pairs, diffnl.neighbor_pairs(positions, cell, True, 2.0, owner, sorted=True))
