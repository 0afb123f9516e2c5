"""The list against the oracle, bit for bit, on systems that hypothesis makes up.

The gate of 20,000 examples, and of 20,000 that lie up to 10^7 Å from the origin, in float32 and in float64:

    HYPOTHESIS_PROFILE=thorough pytest tests/test_hypothesis.py

It takes about 20 minutes of one core. The default profile draws 300, quick 60. A failure prints its example.
`--hypothesis-seed=1` draws other examples: several seeds keep several cores busy.
"""

import itertools
import math

import numpy as np
import torch
from compare import assert_adjoint, assert_list_equals, assert_same_bits, bits, canonical
from hypothesis import event, given, settings
from hypothesis import strategies as st

import diffnl

A_TENTH = settings(max_examples=settings().max_examples // 10)  # for what the first test already covers
MOST_CANDIDATES = 12_000  # what one example may cost the oracle: pairs of atoms times images

# Few values, often met: they put atoms on faces and lattice points, and pairs at the cutoff to the last bit.
ROUND = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
LENGTH = st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0]), st.floats(0.375, 9.0, width=32))
LEAN = st.one_of(st.just(0.0), ROUND, st.floats(-4.0, 4.0, width=32), st.floats(-40.0, 40.0, width=32))
FRACTION = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.25, -0.0, -1.0, 2.0]),
    st.sampled_from([1.0 - 2.0**-24, 1.0 - 2.0**-53, 1.0 + 2.0**-23, -(2.0**-60)]),
    st.floats(0.0, 1.0, width=32),
    st.floats(-7.0, 7.0, width=32),
)
CUTOFF = st.one_of(
    st.sampled_from([1.0, 2.0, 3.0, 5.0, math.sqrt(2.0), math.sqrt(3.0), math.sqrt(8.0)]),
    st.floats(0.05, 12.0),
    st.sampled_from([1e-200, 1e-30, 1e30, 1e200]),  # squares that underflow or overflow
)
WHOLE = st.tuples(*[st.integers(-2, 2).map(float)] * 3)
FAR = st.one_of(
    st.just(0.0),
    st.builds(
        lambda sign, exponent: sign * 10.0**exponent, st.sampled_from([-1.0, 1.0]), st.floats(0.0, 7.0)
    ),
    st.sampled_from([1e3, -1e4, 1e5, -1e6, 1e7, 2.0**20, -(2.0**23)]),
)
OPEN_ROW = st.sampled_from([None, (0.0, 0.0, 0.0), (1.0, 2.0, -0.5)])  # None: a good row, only not periodic


@st.composite
def turns(draw):
    """A rotation (3, 3) about an axis of the frame, which changes the axes round too."""
    angle = draw(st.floats(0.0, math.tau))
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[0.0, c, s], [0.0, -s, c], [1.0, 0.0, 0.0]])


@st.composite
def lattices(draw):
    """Rows (3, 3) from a lower triangle, whose diagonal is the plane spacings, turned and mirrored."""
    a, b, c = (draw(LENGTH) for _ in range(3))
    rows = np.array([[a, 0.0, 0.0], [draw(LEAN), b, 0.0], [draw(LEAN), draw(LEAN), c]])
    if draw(st.booleans()):
        rows[draw(st.integers(0, 2))] *= draw(st.sampled_from([0.05, 0.2, 8.0]))  # thin, flat or long
    rows = rows[list(draw(st.permutations(range(3))))]
    if draw(st.booleans()):
        rows = rows[:, ::-1]
    if draw(st.booleans()):
        rows = rows @ draw(turns())
    return rows


@st.composite
def one_system(draw, most_atoms):
    """(positions (n, 3), cell (3, 3), flags) with up to `most_atoms` atoms in and around the cell."""
    cell = draw(lattices())
    flags = draw(st.tuples(*[st.booleans()] * 3))
    rows = []
    for _ in range(draw(st.integers(0, most_atoms))):
        fractions = [draw(FRACTION) for _ in range(3)]
        rows.append(np.array(fractions) @ cell)
        if len(rows) > 1 and draw(st.integers(0, 4)) == 0:  # on top of another atom, perhaps of its image
            rows[-1] = rows[draw(st.integers(0, len(rows) - 2))] + np.array(draw(WHOLE)) @ cell
    for axis in range(3):
        row = None if flags[axis] else draw(OPEN_ROW)
        if row is not None:
            cell[axis] = row
    return np.array(rows).reshape(-1, 3), cell, flags


@st.composite
def far_system(draw, most_atoms):
    """(positions (n, 3), cell (3, 3), flags) up to 10^7 Å from the origin, and in up to four places.

    Where an axis is open, perhaps with a block of a cubic lattice in any orientation: many atoms share a bin,
    and many pairs are at the cutoff.
    """
    positions, cell, flags = draw(one_system(most_atoms))
    sides = {0: (4, 4, 3), 1: (4, 2, 2), 2: (2, 2, 2)}.get(sum(flags))  # what the oracle can afford
    if sides is not None and draw(st.booleans()):
        points = itertools.product(*(range(draw(st.integers(1, most))) for most in sides))
        block = draw(LENGTH) * np.array(list(points), dtype=float)
        positions = np.concatenate([positions, block @ draw(turns()) @ draw(turns())])
    periodic = np.array(flags)[:, None] * cell
    onto_open = np.eye(3) - np.linalg.pinv(periodic) @ periodic
    parted = st.lists(st.integers(0, len(positions) - 1), max_size=3) if len(positions) > 0 else st.just([])
    for atom in draw(parted):
        cells = np.array([draw(st.integers(-1000, 1000)) for _ in range(3)])
        positions[atom] += cells @ periodic + np.array([draw(FAR) for _ in range(3)]) @ onto_open
    return positions + np.array([draw(FAR) for _ in range(3)]), cell, flags


def affordable(cell, flags, cutoff, atoms):
    """The cutoff, or a smaller one for which the oracle looks at few enough (i, j, S)."""
    periodic = cell[list(flags)]
    if len(periodic) == 0:
        return cutoff
    spacings = 1.0 / np.linalg.norm(np.linalg.pinv(periodic), axis=0)
    cutoff = min(cutoff, 100.0 * spacings.min())
    while (
        atoms * atoms * np.prod(2.0 * np.floor(cutoff / spacings) + 5.0) > MOST_CANDIDATES and cutoff > 1e-3
    ):
        cutoff *= 0.7
    return cutoff


@st.composite
def inputs(draw, system=one_system):
    """Arguments of the list in float64: 1 to 3 systems, possibly interleaved, with an affordable cutoff."""
    count = draw(st.sampled_from([1, 1, 2, 3]))
    systems = [draw(system(12 // count)) for _ in range(count)]
    cutoff = draw(CUTOFF)
    for positions, cell, flags in systems:
        cutoff = affordable(cell, flags, cutoff, len(positions))
    positions = torch.from_numpy(np.concatenate([system[0] for system in systems]))
    cell = torch.from_numpy(np.stack([system[1] for system in systems]))
    pbc = torch.tensor([system[2] for system in systems])
    owner = torch.repeat_interleave(torch.arange(count), torch.tensor([len(system[0]) for system in systems]))
    if count == 1:
        return positions, cell[0], pbc[0], cutoff, None
    if draw(st.booleans()):
        order = torch.tensor(draw(st.permutations(range(len(owner)))), dtype=torch.int64)
        positions, owner = positions[order], owner[order]
    return positions, cell, pbc, cutoff, owner


def in_dtype(drawn, dtype):
    """A drawn input of its own in a dtype."""
    positions, cell, pbc, cutoff, system_idx = drawn
    return positions.to(dtype, copy=True), cell.to(dtype, copy=True), pbc, cutoff, system_idx


def on_device(device, values):
    return tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in values)


def attempt(search, positions, cell, pbc, cutoff, system_idx, full):
    """(pairs, "") or (None, what the search refuses)."""
    try:
        return search(positions, cell, pbc, cutoff, system_idx, full=full, sorted=True), ""
    except ValueError as refusal:
        return None, str(refusal)


def assert_equals_reference(drawn, full, device):
    """In both dtypes the list has the oracle's pairs and bits, or both refuse the input."""
    for dtype in (torch.float32, torch.float64):
        r, h, pbc, cutoff, system_idx = in_dtype(drawn, dtype)
        positions, cell, flags, _, owner = on_device(device, (r, h, pbc, cutoff, system_idx))
        expected, refusal = attempt(diffnl.reference.neighbor_pairs, r, h, pbc, cutoff, system_idx, full)
        _, our_refusal = attempt(diffnl.neighbor_pairs, positions, cell, flags, cutoff, owner, full)
        if refusal or our_refusal:  # few cells are so thin and lean so far that a dtype cannot hold them
            event(f"refused in {dtype}")
            # Whether images blur is a matter of more or less: at the edge, rounding decides on either side.
            blurred = "can tell periodic images apart" in refusal + our_refusal
            assert refusal == our_refusal or blurred and "" in (refusal, our_refusal)
        else:
            pairs = assert_list_equals(expected, (positions, cell, flags, owner), cutoff, full)
            again = diffnl.pair_vectors(positions, cell, pairs.mapping, pairs.shifts, owner)
            assert torch.equal(bits(again), bits(pairs.vectors))


@given(drawn=inputs(), full=st.booleans())
def test_list_equals_reference_bit_for_bit(drawn, full, device):
    assert_equals_reference(drawn, full, device)


@given(drawn=inputs(far_system), full=st.booleans())
def test_list_equals_reference_far_from_the_origin(drawn, full, device):
    assert_equals_reference(drawn, full, device)


@A_TENTH
@given(drawn=inputs(), full=st.booleans(), seed=st.integers(0, 9))
def test_gradients_follow_the_formula(drawn, full, seed, device):
    """Of the search, and of a list in another order, against the sums of the contract."""
    for dtype in (torch.float32, torch.float64):
        positions, cell, pbc, cutoff, owner = on_device(device, in_dtype(drawn, dtype))
        leaves = positions.requires_grad_(), cell.requires_grad_()
        sizes = len(positions), cell.numel() // 9
        try:
            mapping, shifts, vectors = diffnl.neighbor_pairs(*leaves, pbc, cutoff, owner, full=full)
        except ValueError:
            event(f"refused in {dtype}")
            continue
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(vectors.shape, generator=generator, dtype=dtype).to(device)
        assert_adjoint(torch.autograd.grad(vectors, leaves, g), g, mapping, shifts, owner, *sizes)
        shuffled = torch.randperm(len(g), generator=generator).to(device)
        mapping, shifts = mapping[:, shuffled], shifts[shuffled]
        again = diffnl.pair_vectors(*leaves, mapping, shifts, owner)
        assert_adjoint(torch.autograd.grad(again, leaves, g), g, mapping, shifts, owner, *sizes)


@A_TENTH
@given(drawn=inputs())
def test_full_list_is_the_half_list_and_its_mirror(drawn, device):
    positions, cell, pbc, cutoff, system_idx = on_device(device, drawn)
    half = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=False)
    full = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, sorted=True)
    both = diffnl.Pairs(
        torch.cat([half.mapping, half.mapping.flip(0)], dim=1),
        torch.cat([half.shifts, -half.shifts]),
        # 0 - v, not -v: a full list holds 0 where a negated vector holds -0.
        torch.cat([half.vectors, 0.0 - half.vectors]),
    )
    assert_same_bits(canonical(both), full)


@A_TENTH
@given(
    points=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), max_size=8),
    box=st.tuples(*[st.integers(2, 5)] * 3),
    squared=st.integers(1, 30),
    pbc=st.tuples(*[st.booleans()] * 3),
)
def test_lattice_points_at_the_cutoff_are_not_pairs(points, box, squared, pbc, device):
    """On integer points d2 is exact in every dtype: the list must be the integers' own."""
    expected = integer_pairs(points, box, squared, pbc)
    # d2 < squared is d2 < squared - 1/2 for integers, and no rounding reaches that; a whole root is exact.
    cutoffs = [math.sqrt(squared - 0.5)]
    if math.isqrt(squared) ** 2 == squared:
        cutoffs.append(math.isqrt(squared))
    for dtype in (torch.float32, torch.float64):
        positions = torch.tensor(points, dtype=dtype, device=device).reshape(-1, 3)
        cell = torch.diag(torch.tensor(box, dtype=dtype, device=device))
        for cutoff in cutoffs:
            pairs = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, sorted=True)
            assert torch.cat([pairs.mapping.T, pairs.shifts], dim=1).tolist() == expected


def integer_pairs(points, box, squared, pbc):
    """[[i, j, S0, S1, S2]] in order, with |v|^2 < squared, in integer arithmetic."""
    points = np.array(points, dtype=np.int64).reshape(-1, 3)
    # |r_j - r_i| <= 6 and |v| < 5.5 along an axis of at least 2.
    images = np.array(list(itertools.product(*(range(-6, 7) if flag else [0] for flag in pbc))))
    v = points[None, :, None] - points[:, None, None] + images * np.array(box)
    i, j, image = np.nonzero((v * v).sum(-1) < squared)
    rows = np.column_stack([i, j, images[image]])
    return sorted(rows[(i != j) | rows[:, 2:].any(1)].tolist())
