"""Systems at the limits by which kernels cut their work: lists and adjoints against oracles, any backend.

Bins that hold as many atoms as a wave, a word or a tile of candidates; stencils from one bin to thousands;
many systems, most of them empty; rows and shifts on both sides of what a compact form of the list can hold.
"""

import itertools

import pytest
import torch
from compare import (
    assert_adjoint,
    assert_equal_bits,
    assert_list_equals,
    assert_list_equals_reference,
    assert_same_bits,
    assert_well_formed,
    canonical,
)
from systems import System, cubic, scatter, tensor

import diffnl

both_lists = pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
ALL = (True, True, True)
LEANING = [[1.0, 0.0, 0.0], [0.4, 1.0, 0.0], [-0.3, 0.6, 1.0]]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shuffled(positions, seed):
    return positions[torch.randperm(len(positions), generator=seeded(seed))]


def crowd(n):
    """n atoms in one bin, half as many in a bin nearby, and four that are alone, in any order."""
    near, far = scatter(n, cubic(0.5), n), scatter((n + 1) // 2, cubic(0.5), n + 1) + 2.0
    alone = tensor([[6.0, 0.1, 0.2], [0.3, 6.2, 0.4], [0.5, 0.6, 5.9], [7.0, 7.1, 7.2]])
    return shuffled(torch.cat([near, far, alone]), n)


def crowds():
    yield from (
        System(f"bin_of_{n}_open", crowd(n), None, None, (3.5,)) for n in (1, 31, 32, 33, 64, 65, 200)
    )
    box = tensor(cubic(9.0))
    yield from (System(f"bin_of_{n}", crowd(n), box, ALL, (3.5,)) for n in (1, 31, 32, 33, 64, 65))


def stencils():
    """Boxes from a tenth of the cutoff to many cutoffs, in both shapes, with few and with many atoms."""
    cutoff = 4.0
    for ratio, n in (
        *((0.11, 3), (0.26, 6), (0.49, 10), (0.51, 10), (0.99, 30), (1.01, 30), (1.49, 60), (1.51, 60)),
        *((2.01, 12), (2.01, 120), (3.01, 100), (4.5, 20), (4.5, 100), (6.5, 100), (11.0, 60)),
    ):
        for shape, edge in (("cube", cubic(ratio * cutoff)), ("leaning", _scaled(LEANING, ratio * cutoff))):
            positions = scatter(n, edge, n, -1.0, 2.0)
            yield System(f"{shape}_of_{ratio}_cutoffs_{n}_atoms", positions, tensor(edge), ALL, (cutoff,))
    box = torch.diag(tensor([2.5, 7.0, 30.0]))
    for pbc in itertools.product([False, True], repeat=3):
        name = "flat_" + "".join("xyz"[k] if pbc[k] else "-" for k in range(3))
        yield System(name, scatter(50, box.tolist(), 50), box, pbc, (4.0,))


def sparse():
    """More bins than any table of them should hold: clusters here and there in a large box."""
    centres = scatter(30, cubic(300.0), 60)
    positions = (centres[:, None] + scatter(4, cubic(1.5), 61)).reshape(-1, 3)
    yield System("clusters_in_a_large_box", shuffled(positions, 62), tensor(cubic(300.0)), ALL, (2.0,))
    yield System("clusters_in_the_open", shuffled(positions, 63), None, None, (2.0,))
    line = torch.zeros(200, 3, dtype=torch.float64)
    line[:, 1] = 1e4 * torch.rand(200, generator=seeded(64), dtype=torch.float64)
    yield System("line", line, None, None, (60.0,))


def batches():
    """Many systems, one large among small ones, and hardly any atom or system."""
    generator = seeded(65)
    counts = torch.randint(0, 4, (300,), generator=generator) * (torch.rand(300, generator=generator) < 0.6)
    shapes = 3.0 * torch.eye(3, dtype=torch.float64) + 0.5 * torch.randn(
        300, 3, 3, generator=generator, dtype=torch.float64
    )
    flags = (torch.rand(300, 3, generator=generator) < 0.7).tolist()
    yield _batch("systems_300", counts, shapes, flags, 3.0)

    counts = torch.tensor([0, 1, 150, 2, 0, 0, 3, 1, 1, 0] + [1, 0, 2] * 10)
    cells = tensor(cubic(2.5)).repeat(len(counts), 1, 1)
    cells[2] *= 4.0
    yield _batch("one_large_among_small", counts, cells, ALL, 3.0)
    yield _batch("two_alike", torch.tensor([90, 90]), tensor(cubic(8.0)).repeat(2, 1, 1), ALL, 3.0)

    lone, cells = scatter(1, cubic(1.0), 66), tensor(cubic(1.0)).repeat(40, 1, 1)
    yield System("last_of_40", lone, cells, ALL, (2.5,), torch.tensor([39]))
    yield System("one_of_one", lone, cells[:1], ALL, (2.5,), torch.tensor([0]))
    yield System("no_atoms_40", lone[:0], cells, ALL, (2.5,), torch.tensor([], dtype=torch.int64))
    yield System("no_systems", lone[:0], cells[:0], ALL, (2.5,))


def _scaled(rows, factor):
    return (factor * tensor(rows)).tolist()


def _batch(name, counts, cells, pbc, cutoff):
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    atoms = [scatter(n, cells[b].tolist(), b, -1.0, 2.0) for b, n in enumerate(counts.tolist())]
    order = torch.randperm(len(owner), generator=seeded(67))
    return System(name, torch.cat(atoms)[order], cells, pbc, (cutoff,), owner[order])


SYSTEMS = {system.name: system for source in (crowds, stencils, sparse, batches) for system in source()}
named = pytest.mark.parametrize("name", SYSTEMS)


@named
@both_lists
def test_list_equals_reference(name, full, dtype, device):
    system = SYSTEMS[name]
    assert_list_equals_reference(system.arguments(dtype, device), system.cutoffs[0], full)


@pytest.mark.parametrize(
    "n", [127, 128, 129, 130, 255, 257, 511, 513, 767, 768, 769, 770, 1023, 1024, 1025, 1026, 1540]
)
def test_rows_and_tiles_of_any_size(n, device):
    """n atoms closer to each other than the cutoff: n candidates in one bin, rows of n - 1."""
    positions = scatter(n, cubic(0.9), n).to(device, torch.float32)
    i, j = (index.flatten() for index in torch.meshgrid(*[torch.arange(n)] * 2, indexing="ij"))
    i, j = i[i != j], j[i != j]
    here = positions.cpu()
    expected = diffnl.Pairs(torch.stack([i, j]), torch.zeros(len(i), 3).int(), here[j] - here[i])
    assert_list_equals(expected, (positions, None, None, None), 2.0, full=True)


# ----- gradients -------------------------------------------------------------------------------------------


def check_gradients(arguments, cutoff, full=True, in_order=False):
    """Backward and second backward of the search, and of the same list handed in; returns the pairs.

    With the pairs fixed, the second backward is the first map again: bit for bit the vectors of other
    positions and another cell.
    """
    positions, cell, pbc, system_idx = arguments
    if cell is None:
        cell, pbc = positions.new_zeros(3, 3), False
    leaves = positions, cell = positions.detach().requires_grad_(), cell.detach().requires_grad_()
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=full, sorted=in_order)
    mapping, shifts, vectors = pairs
    assert_well_formed(pairs, positions)
    sizes = len(positions), cell.numel() // 9
    generator = seeded(68)
    g = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype).to(vectors.device)
    others = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in leaves]

    order = torch.randperm(len(g), generator=generator).to(g.device)
    in_another_order = mapping[:, order], shifts[order]
    again = diffnl.pair_vectors(positions, cell, *in_another_order, system_idx)
    for v, weights, of_list in ((vectors, g, (mapping, shifts)), (again, g[order], in_another_order)):
        weights.requires_grad_()
        first = torch.autograd.grad(v, leaves, weights, create_graph=True)
        assert_adjoint(first, weights, *of_list, system_idx, *sizes)
        second = torch.autograd.grad(first, weights, others)
        assert_equal_bits(second, [diffnl.pair_vectors(*others, *of_list, system_idx)])
        for only, leaf in enumerate(leaves):
            (alone,) = torch.autograd.grad(v, leaf, weights, retain_graph=True)
            assert_equal_bits([alone], [first[only]])
    return pairs


@named
@both_lists
def test_gradients(name, full, dtype, device):
    system = SYSTEMS[name]
    check_gradients(system.arguments(dtype, device), system.cutoffs[0], full)


@named
def test_gradients_of_a_sorted_list(name, device):
    system = SYSTEMS[name]
    check_gradients(system.arguments(torch.float64, device), system.cutoffs[0], in_order=True)


@named
def test_the_list_does_not_depend_on_who_wants_a_gradient(name, dtype, device):
    positions, cell, pbc, system_idx = SYSTEMS[name].arguments(dtype, device)
    cutoff = SYSTEMS[name].cutoffs[0]
    plain = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx)
    pairs = diffnl.neighbor_pairs(positions.requires_grad_(), cell, pbc, cutoff, system_idx)
    assert pairs.vectors.requires_grad and not plain.vectors.requires_grad
    assert_same_bits(pairs, plain)


@named
def test_same_bits_again(name, device):
    """The whole step: list, gradients and second gradients, twice."""
    results = []
    for _ in range(2):
        positions, cell, pbc, system_idx = SYSTEMS[name].arguments(torch.float32, device)
        if cell is None:
            cell, pbc = positions.new_zeros(3, 3), False
        leaves = positions.requires_grad_(), cell.requires_grad_()
        pairs = diffnl.neighbor_pairs(*leaves, pbc, SYSTEMS[name].cutoffs[0], system_idx)
        first = torch.autograd.grad(pairs.vectors.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        results.append((*pairs, *first, *second))
    (mapping, shifts, *floats), (again, shifts_again, *floats_again) = results
    assert torch.equal(mapping, again) and torch.equal(shifts, shifts_again)
    assert_equal_bits(floats, floats_again)


# ----- shifts and rows that a compact list can or cannot hold ----------------------------------------------


@both_lists
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("largest", [28, 29, 30, 31, 32, 33, 63, 64, 65, 150])
def test_gradients_around_shifts_of_31(largest, axis, full, dtype, device):
    """A chain of cells of length 1: the cutoff sets the largest shift."""
    positions = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.15, 0.35], [0.15, 0.3, 0.2]], dtype=dtype)
    pbc = [k == axis for k in range(3)]
    arguments = positions.to(device), torch.eye(3, dtype=dtype, device=device), pbc, None
    pairs = check_gradients(arguments, largest + 0.5, full)
    assert int(pairs.shifts.abs().max()) == largest


@both_lists
@pytest.mark.parametrize("cells_away", [20, 29, 30, 31, 32, 33, 40, 3000])
def test_gradients_where_atoms_lie_in_far_cells(cells_away, full, dtype, device):
    """Few large shifts among many small ones: one atom of a crystal was left behind."""
    positions = scatter(12, cubic(4.0), 69)
    positions[5, 1] += 4.0 * cells_away
    cell = tensor(cubic(4.0)).to(device, dtype)
    pairs = check_gradients((positions.to(device, dtype), cell, ALL, None), 3.0, full)
    assert abs(int(pairs.shifts.abs().max()) - cells_away) <= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_largest_shifts_of_either_sign_survive(axis, dtype, device):
    """v = S @ h is exact in a lattice of whole numbers, and the gradient of the cell a sum over shifts."""
    positions = torch.zeros(1, 3, dtype=dtype, device=device)
    cell = (2.0 * torch.eye(3, dtype=dtype, device=device)).requires_grad_()
    pbc = [k == axis for k in range(3)]
    vectors = diffnl.neighbor_pairs(positions, cell, pbc, 2 * 30 + 1.0).vectors
    (gradient,) = torch.autograd.grad(vectors, cell, vectors.detach())
    expected = torch.zeros(3, 3)
    expected[axis, axis] = 2 * 2 * sum(s * s for s in range(1, 31))
    assert gradient.tolist() == expected.tolist()


BODY_CENTRED = torch.tensor([[0.25, 0.25, 0.25], [0.75, 0.75, 0.75]])


@both_lists
@pytest.mark.parametrize("cutoff, fits", [(12.44, True), (12.5, True), (12.52, False), (13.0, False)])
def test_gradients_around_rows_of_16383(cutoff, fits, full, dtype, device):
    """Two atoms in a cell of length 1, with rows just short enough and just too long."""
    arguments = BODY_CENTRED.to(device, dtype), torch.eye(3, dtype=dtype, device=device), ALL, None
    pairs = check_gradients(arguments, cutoff, full)
    longest = int(pairs.mapping[0].bincount().max())
    if full:
        assert (longest < 1 << 14) == fits
        assert abs(longest - (1 << 14)) < 3000


def test_sorted_long_rows(device):
    """Rows too long to be sorted where they lie, next to short ones, in order and against the oracle."""
    cells = torch.stack([tensor(cubic(1.0)), tensor(cubic(5.0))]).to(device)
    positions = torch.cat([BODY_CENTRED.double(), scatter(10, cubic(5.0), 70)]).to(device)
    owner = torch.tensor([1] * 5 + [0] * 2 + [1] * 5, device=device)
    positions = positions[[2, 3, 4, 5, 6, 0, 1, 7, 8, 9, 10, 11]]
    pairs = assert_list_equals_reference((positions, cells, ALL, owner), 6.3, full=True)
    rows = pairs.mapping[0].bincount()
    assert int(rows.max()) > 2048 and int(rows.min()) < 1024


# ----- lists of the caller's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("systems", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 31, 33, 257, 5000])
def test_adjoint_of_any_list(count, systems, dtype, device):
    """Pairs in any order, repeated, of an atom with itself; atoms and systems that no pair names."""
    generator = seeded(71 + count)
    atoms = 40
    positions = torch.randn(atoms, 3, generator=generator, dtype=torch.float64)
    # Half of all pairs lead to atom 7, and none to the last ten.
    mapping = torch.randint(0, atoms - 10, (2, count), generator=generator)
    mapping[1, torch.rand(count, generator=generator) < 0.5] = 7
    shifts = torch.randint(-1000, 1001, (count, 3), generator=generator, dtype=torch.int32)
    cell = torch.randn(systems, 3, 3, generator=generator, dtype=torch.float64)
    owner = torch.randint(0, systems, (atoms,), generator=generator) // 2 * 2 if systems > 1 else None
    if owner is not None:
        mapping[1] = torch.where(owner[mapping[0]] == owner[mapping[1]], mapping[1], mapping[0])
    g = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    leaves = positions.to(device, dtype).requires_grad_(), cell.to(device, dtype).requires_grad_()
    mapping, shifts, g = mapping.to(device), shifts.to(device), g.to(device, dtype)
    owner = None if owner is None else owner.to(device)
    vectors = diffnl.pair_vectors(*leaves, mapping, shifts, owner)
    gradients = torch.autograd.grad(vectors, leaves, g)
    assert_adjoint(gradients, g, mapping, shifts, owner, atoms, systems)
    assert not gradients[0][atoms - 10 :].any()
    if systems > 1:
        assert not gradients[1][1].any(), "the system without atoms"


def test_adjoint_of_a_list_on_one_atom(dtype, device):
    """Every pair joins the same two atoms: two sums of 20,000 terms, and many that are empty."""
    positions = torch.zeros(500, 3, dtype=dtype, device=device, requires_grad=True)
    mapping = torch.tensor([[3], [498]], device=device).expand(2, 20_000)
    shifts = torch.zeros(20_000, 3, dtype=torch.int32, device=device)
    vectors = diffnl.pair_vectors(positions, None, mapping, shifts)
    g = torch.randint(-8, 9, (20_000, 3), generator=seeded(72)).to(device, dtype)  # sums are exact
    (gradient,) = torch.autograd.grad(vectors, positions, g)
    expected = torch.zeros(500, 3, dtype=dtype)
    expected[498] = g.sum(0)
    expected[3] = -g.sum(0)
    assert torch.equal(gradient.cpu(), expected)


def test_the_gradient_of_the_cell_keeps_its_digits(device):
    """Terms of either sign that nearly cancel, in float32: the stress is what is left of them."""
    count = 60_000
    generator = seeded(73)
    mapping = torch.arange(count).remainder(50).repeat(2, 1).to(device)
    shifts = torch.randint(-3, 4, (count, 3), generator=generator, dtype=torch.int32).to(device)
    g = torch.randn(count, 3, generator=generator).to(device)
    positions, cell = torch.zeros(50, 3, device=device), torch.eye(3, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(diffnl.pair_vectors(positions, cell, mapping, shifts), cell, g)
    terms = shifts.double()[:, :, None] * g.double()[:, None, :]
    error = (gradient.double() - terms.sum(0)).abs()
    assert (error < 1e-6 * terms.abs().sum(0)).all()


# ----- many atoms, many systems ----------------------------------------------------------------------------


def dimers(count, seed):
    """Numbers (2, count) of the atoms of each dimer, in any order."""
    return torch.randperm(2 * count, generator=seeded(seed)).reshape(2, count)


def assert_equal_values(pairs, expected):
    """By value, in any order: j - i is -0 where i - j is 0."""
    for ours, theirs in zip(canonical(pairs), canonical(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cutoff, dtype", [(1.5, torch.float32), (8.5, torch.float64)])
@pytest.mark.parametrize("count", [1023, 1024, 1025, 4095, 4096, 4097, 35_000])
def test_many_atoms(count, cutoff, dtype, device):
    """Dimers on a lattice of spacing 10, a few or a hundredth of one in a bin: the list is known."""
    first, second = dimers(count, 74)
    k = torch.arange(count)
    site = 10.0 * torch.stack([k % 40, k // 40 % 40, k // 1600], 1)
    positions = torch.empty(2 * count, 3)
    positions[first], positions[second] = site, site + torch.tensor([1.0, 0.0, 0.0])
    arguments = positions.to(device, dtype), None, None, None
    pairs = check_gradients(arguments, cutoff)
    i = torch.cat([first, second])
    j = torch.cat([second, first])
    step = torch.tensor([1.0, 0.0, 0.0], dtype=dtype).expand(count, 3)
    expected = diffnl.Pairs(torch.stack([i, j]), torch.zeros(2 * count, 3).int(), torch.cat([step, -step]))
    assert_equal_values(pairs, expected)


@pytest.mark.parametrize("count, empty", [(255, 0), (257, 0), (1024, 0), (1025, 0), (90, 1958), (90, 1959)])
def test_many_systems(count, empty, device):
    """A dimer along a cell of length 2.5, which meets itself through the face too, or no atom in each."""
    first, second = dimers(count, 75)
    owner = torch.empty(2 * count, dtype=torch.int64)
    owner[first] = owner[second] = torch.randperm(count + empty, generator=seeded(76))[:count]
    positions = torch.zeros(2 * count, 3)
    positions[second, 0] = 1.0
    cell = (2.5 * torch.eye(3)).repeat(count + empty, 1, 1)
    arguments = positions.to(device), cell.to(device), (True, False, False), owner.to(device)
    pairs = check_gradients(arguments, 2.0)
    i = torch.cat([first, second, first, second])
    j = torch.cat([second, first, second, first])
    shifts, vectors = torch.zeros(4 * count, 3).int(), torch.zeros(4 * count, 3)
    shifts[:, 0] = torch.tensor([0, 0, -1, 1]).repeat_interleave(count)
    vectors[:, 0] = torch.tensor([1.0, -1.0, -1.5, 1.5]).repeat_interleave(count)
    assert_equal_values(pairs, diffnl.Pairs(torch.stack([i, j]), shifts, vectors))


def dilute(volume, seed, n=60):
    """n atoms in a periodic cube of `volume` Å³ an atom."""
    edge = cubic((n * volume) ** (1 / 3))
    return System("dilute", scatter(n, edge, seed), tensor(edge), ALL, (4.0,))


def test_what_was_searched_before_changes_nothing(dtype, device):
    """On a GPU a search goes by the last one's density to make memory and to launch the fill before its pairs
    are counted. Here come more pairs than that, fewer, hardly any, none; links that fit and that do not."""
    volumes = (10.0, 10.0, 9.7, 12.0, 2.0, 40.0, 3e4, 10.0, 1e9, 10.0)
    for seed, volume in enumerate(volumes):
        for full in (True, True, False, True):
            system = dilute(volume, seed)
            arguments = system.arguments(dtype, device)
            check_gradients(arguments, 4.0, full)
            assert_list_equals_reference(arguments, 4.0, full)
    lone = torch.zeros(1, 3, dtype=dtype, device=device)
    cell = torch.eye(3, dtype=dtype, device=device)
    for edge, cutoff in ((1.0, 3.0), (0.1, 3.15), (1.0, 3.0), (1.0, 3.0)):
        arguments = lone, edge * cell, (True, False, False), None
        check_gradients(arguments, cutoff)
        assert_list_equals_reference(arguments, cutoff, True)


def test_a_fault_after_a_good_guess_is_raised(dtype, device):
    arguments = positions, cell, pbc, _ = dilute(10.0, 1).arguments(dtype, device)
    for _ in range(2):
        expected = diffnl.neighbor_pairs(positions, cell, pbc, 4.0)
    wrong = positions.clone()
    wrong[7, 1] = torch.nan
    with pytest.raises(ValueError, match="atom 7"):
        diffnl.neighbor_pairs(wrong, cell, pbc, 4.0)
    assert_equal_bits(diffnl.neighbor_pairs(positions, cell, pbc, 4.0), expected)
    assert_list_equals_reference(arguments, 4.0, True)


@both_lists
def test_what_a_guessed_list_leaves_empty_is_zero(full, dtype, gpu_kernels, device):
    """torch.save writes whole storages: what the memory held before must not be in them."""
    positions, cell, pbc, _ = dilute(1.0, 1, 600).arguments(dtype, device)

    def storages(pairs):
        return [torch.empty(0, dtype=t.dtype, device=device).set_(t.untyped_storage()) for t in pairs]

    used: set[int] = set()
    for _ in range(4):
        # The memory of one list is the next one's, as likely as not.
        for stored in storages(diffnl.neighbor_pairs(positions, cell, pbc, 4.0, full=full)):
            used.add(stored.fill_(7).data_ptr())
            del stored
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, 4.0, full=full)
    assert any(part.data_ptr() in used for part in pairs), "fresh memory shows nothing"
    for part, stored in zip(pairs, storages(pairs), strict=True):
        assert (len(stored) > part.numel()) == gpu_kernels
        assert torch.equal(stored[: part.numel()], part.flatten())
        assert not stored[part.numel() :].any()


@both_lists
def test_a_list_keeps_no_more_memory_than_it_needs(full, dtype, device):
    """64 kB or an eighth more, whatever was searched before; and it is still the same list."""
    for volume, n in ((1.0, 600), (1.1, 600), (100.0, 600), (1.0, 600), (1.0, 10)):
        positions, cell, pbc, _ = dilute(volume, 1, n).arguments(dtype, device)
        pairs = diffnl.neighbor_pairs(positions, cell, pbc, 4.0, full=full)
        kept = sum(part.untyped_storage().nbytes() for part in pairs)
        needed = sum(part.numel() * part.element_size() for part in pairs)
        assert needed <= kept <= max(needed + 2**16, 1.125 * needed)
        in_order = diffnl.neighbor_pairs(positions, cell, pbc, 4.0, full=full, sorted=True)
        assert_same_bits(canonical(pairs), in_order)
