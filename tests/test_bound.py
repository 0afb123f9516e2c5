"""No pair is lost to rounding, wherever atoms lie: a test for each term of "The bound" in docs/algorithm.md.

Most systems are pieces of a cubic lattice whose spacing is the cutoff. Nearest neighbours are then at the
cutoff but for the rounding of their positions, and the planes of the lattice are where bins end.
"""

import math

import pytest
import torch
from compare import assert_list_equals_reference, assert_same_bits, canonical, on_cpu
from conftest import seeds

import diffnl

SPACING = 2.0
KINDS = {
    "open": (False, False, False),
    "wire": (False, True, False),
    "slab": (True, False, True),
    "periodic": (True, True, True),
}


def of_kinds(*kinds):
    return pytest.mark.parametrize("flags", [KINDS[kind] for kind in kinds], ids=kinds)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rotation(seed):
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator(seed), dtype=torch.float64))
    return q


def lattice(flags, seed, on_open):
    """(positions (n, 3), cell (3, 3)) of a rotated cubic lattice.

    It has `on_open` points on open axes, 4 on the first periodic one (as many bins), 2 on others.
    """
    sides = [2.0 if flag else float(on_open) for flag in flags]
    if True in flags:
        sides[flags.index(True)] = 4.0
    points = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in sides))
    cell = SPACING * torch.diag(torch.tensor(sides, dtype=torch.float64))
    return SPACING * points @ rotation(seed), cell @ rotation(seed)


def direction(seed):
    vector = torch.randn(3, generator=generator(seed), dtype=torch.float64)
    return vector / vector.norm()


def assert_list(positions, cell, flags, cutoff, dtype, device):
    """The list in `dtype` has the oracle's pairs and bits, and the mirror image of each pair. Returns it."""
    arguments = positions.to(device, dtype), cell.to(device, dtype), torch.tensor(flags, device=device), None
    pairs = assert_list_equals_reference(arguments, cutoff, full=True)
    # 0 - v, not -v: a full list holds 0 where a negated vector holds -0.
    mirrored = pairs.mapping.flip(0), -pairs.shifts, 0.0 - pairs.vectors
    assert_same_bits(canonical(diffnl.Pairs(*mirrored)), on_cpu(pairs))
    return pairs


def test_five_atoms_far_along_open_axes_have_six_pairs(dtype, device):
    """The CPU found 5 in float32: its box test rounded positions of 10^6 Å, and allowed for their extent."""
    positions = torch.tensor(
        [
            [1000002.0625, 370001.78125, -609998.125],
            [1000000.0, 370001.90625, -609997.5625],
            [1000004.75, 370000.5, -609998.4375],
            [1000005.1875, 370005.40625, -609999.8125],
            [1000006.5, 370001.75, -609997.375],
        ]
    )
    pairs = assert_list(positions, torch.zeros(3, 3), KINDS["open"], 3.0, dtype, device)
    assert pairs.mapping.shape[1] == 6


@of_kinds(*KINDS)
def test_lattice_with_a_shell_at_the_cutoff_anywhere(flags, dtype, device):
    """30 lists of 343 atoms where all axes are open, 15 smaller ones otherwise, 10^3 to 10^7 Å out."""
    for exponent in range(3, 8):
        for seed in seeds(3 if any(flags) else 6):
            positions, cell = lattice(flags, seed, on_open=5 if any(flags) else 7)
            offset = 10.0**exponent * direction(100 + seed)
            assert_list(positions + offset, cell, flags, SPACING, dtype, device)


# ----- eps (T + extent + c): arithmetic in the dtype -------------------------------------------------------


@of_kinds(*KINDS)
def test_arithmetic_near_the_origin(flags, dtype, device):
    """No distance is large: vectors and boxes are off by a few last bits of the cutoff and the extent."""
    for seed in seeds(6):
        positions, cell = lattice(flags, seed, on_open=5)
        assert_list(positions, cell, flags, SPACING, dtype, device)


@of_kinds("open", "wire", "slab")
def test_extent_of_atoms_that_lie_far_apart(flags, dtype, device):
    """Two pieces, 10^5 Å apart along an open axis: the box test rounds distances from the grid's origin."""
    for seed in seeds(6):
        positions, cell = lattice(flags, seed, on_open=4)
        away = 1e5 * rotation(seed)[flags.index(False)]
        assert_list(torch.cat([positions, positions + away]), cell, flags, SPACING, dtype, device)


@of_kinds("wire", "slab", "periodic")
def test_translations_of_atoms_many_cells_apart(flags, dtype, device):
    """T: S @ h and r_j - r_i are as long as the way between the atoms, and cancel."""
    for seed in seeds(6):
        positions, cell = lattice(flags, seed, on_open=4)
        cells = torch.randint(-2000, 2001, positions.shape, generator=generator(seed)).double()
        assert_list(positions + (cells * torch.tensor(flags)) @ cell, cell, flags, SPACING, dtype, device)


def test_squares_that_underflow(dtype, device):
    """Near the root of a dtype's least number, d2 and cutoff * cutoff are off by halves of that number."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    positions = 5.0 * torch.rand(120, 3, generator=generator(0), dtype=torch.float64)
    for cutoff in (0.72, 1.3, 2.0):  # squares of components below 0.7 are 0, that of 0.72 is 1
        root = least**0.5
        assert_list(root * positions, torch.zeros(3, 3), KINDS["open"], cutoff * root, dtype, device)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_an_extent_beyond_the_dtype(share, dtype, device):
    """Atoms at either end of what the dtype holds: nothing that files or bounds them may become NaN."""
    end = share * torch.finfo(dtype).max * torch.tensor([1.0, -1.0, 1.0], dtype=dtype)
    positions = torch.stack([end, -end, end, -end])
    pairs = assert_list(positions, torch.zeros(3, 3), KINDS["open"], 1.0, dtype, device)
    assert pairs.mapping.tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]


@of_kinds("wire", "slab")
@pytest.mark.parametrize("thickness", [1e-90, 1e-110, 1e-170, 1e-243])
def test_atoms_in_a_plane_but_for_next_to_nothing(flags, thickness, device):
    """An extent whose square is 0: what is left of a column of bins inside the sphere was no number."""
    for axis in range(3):
        open_axis = flags.index(False)
        order = [(k + axis) % 3 for k in range(3)]
        positions = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1]], dtype=torch.float64)
        positions[1, open_axis] = thickness
        cell, turned = 0.3 * torch.eye(3, dtype=torch.float64), [flags[k] for k in order]
        pairs = assert_list(positions[:, order], cell, turned, 2.0, torch.float64, device)
        assert pairs.mapping.shape[1] > 20


# ----- eps64 kappa (max |r| + extent): filing in float64 ---------------------------------------------------


@of_kinds("wire", "slab", "periodic")
@pytest.mark.parametrize("offset", [1e7, 1e11])
def test_filing_far_from_the_cell(flags, offset, device):
    """W and q come from the whole position: in float64 nothing else is rounded as much."""
    for seed in seeds(6):
        positions, cell = lattice(flags, seed, on_open=3)
        offset_vector = offset * direction(200 + seed)
        assert_list(positions + offset_vector, cell, flags, SPACING, torch.float64, device)


@pytest.mark.parametrize("offset", [1e7, 1e9])
def test_filing_of_a_skewed_slab_far_along_its_open_axis(offset, device):
    """kappa: vectors that lean over by 20 cells amplify the rounding of the distance from the slab."""
    flags = KINDS["slab"]
    for seed in seeds(6):
        positions, cell = lattice(flags, seed, on_open=3)
        cell[2] += 20.0 * cell[0]
        assert_list(positions + offset * rotation(seed)[1], cell, flags, SPACING, torch.float64, device)


@pytest.mark.parametrize("distance, refused", [(2e13, False), (4e13, True)])
def test_search_and_reference_refuse_alike(distance, refused, device):
    """Whether float64 can file atoms depends on how far out they are, not on how far apart."""
    cell = torch.eye(3, dtype=torch.float64, device=device)
    positions = torch.tensor([[0.25, 0.25, distance], [0.75, 0.5, -distance]], dtype=torch.float64)
    arguments = positions.to(device), cell, torch.tensor([True, True, False], device=device), 1.25
    for search in (diffnl.neighbor_pairs, diffnl.reference.neighbor_pairs):
        if refused:
            with pytest.raises(ValueError, match="can tell periodic images apart"):
                search(*arguments)
        else:
            assert search(*arguments).mapping.shape[1] == 2 * 4


def test_a_cell_with_one_long_vector(device):
    """The oracle tells the short vectors apart, too, where lengths differ as much as float64 allows."""
    lengths = torch.tensor([1.0, 3e13, 300.0], dtype=torch.float64)
    positions, cell = torch.zeros(1, 3, dtype=torch.float64), torch.diag(lengths) @ rotation(0)
    pairs = assert_list(positions, cell, KINDS["periodic"], 1000.5, torch.float64, device)
    rows = [int(math.sqrt(1000.5**2 - (300 * n) ** 2)) for n in (-3, -2, -1, 0, 1, 2, 3)]
    assert pairs.mapping.shape[1] == sum(2 * row + 1 for row in rows) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [1e-140, 1e-90, 1e-82, 1e-70, 1e72, 1e76, 1e90, 1e140], ids=str)
def test_lengths_whose_products_leave_float64(unit, kind, device):
    """The list in another unit of length is the same, or an error, which is told: never a shorter one."""
    positions, cell = torch.rand(8, 3, generator=generator(1), dtype=torch.float64), torch.eye(3).double()
    pairs = diffnl.neighbor_pairs(5.0 * positions, 5.0 * cell, KINDS[kind], 2.5, sorted=True)
    arguments = (5.0 * unit * positions).to(device), (5.0 * unit * cell).to(device), KINDS[kind], 2.5 * unit
    if kind in ("slab", "periodic") and not 1e-72 < unit < 1e74:
        with pytest.raises(ValueError, match="with lengths between 1e-72 and 1e74"):
            diffnl.neighbor_pairs(*arguments)
        return
    try:
        found = diffnl.neighbor_pairs(*arguments, sorted=True)
    except ValueError as error:
        assert kind == "wire" and not 1e-72 < unit < 1e74 and "with lengths between" in str(error)
    else:
        assert len(pairs.shifts) > 0 and torch.equal(found.mapping.cpu(), pairs.mapping)
        assert torch.equal(found.shifts.cpu(), pairs.shifts)
