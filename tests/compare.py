"""Comparing lists and gradients: canonical order, equality to the bit, sets of pairs, sums within rounding.

Results may be on any device: they are compared on the CPU.
"""

import torch

import diffnl


def order(mapping, shifts):
    """The permutation that puts pairs into ascending (i, j, S)."""
    permutation = torch.arange(mapping.shape[1], device=mapping.device)
    for key in (*shifts.flip(1).T, mapping[1], mapping[0]):
        permutation = permutation[torch.argsort(key[permutation], stable=True)]
    return permutation


def on_cpu(values):
    """The tensors of a tuple on the CPU, without their graph; what is not a tensor stays as it is."""
    return tuple(v.detach().cpu() if isinstance(v, torch.Tensor) else v for v in values)


def canonical(pairs):
    """(mapping, shifts, vectors) on the CPU in ascending (i, j, S)."""
    mapping, shifts, vectors = on_cpu(pairs)
    permutation = order(mapping, shifts)
    return mapping[:, permutation], shifts[permutation], vectors[permutation]


def bits(tensor):
    """The tensor as integers: distinguishes -0 from 0, and equal NaNs are equal."""
    integer = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def assert_well_formed(pairs, positions):
    """Shapes, dtypes and device of the outputs, whatever the input was."""
    assert isinstance(pairs, tuple) and len(pairs) == 3
    count = pairs.mapping.shape[1]
    assert pairs.mapping.shape == (2, count) and pairs.mapping.dtype == torch.int64
    assert pairs.shifts.shape == (count, 3) and pairs.shifts.dtype == torch.int32
    assert pairs.vectors.shape == (count, 3) and pairs.vectors.dtype == positions.dtype
    assert {tensor.device for tensor in pairs} == {positions.device}


def assert_same_bits(actual, expected):
    """Two (mapping, shifts, vectors) are equal, row by row and bit by bit."""
    assert actual[0].shape == expected[0].shape, (
        f"{actual[0].shape[1]} pairs, expected {expected[0].shape[1]}"
    )
    (mapping, shifts, vectors), expected = on_cpu(actual), on_cpu(expected)
    assert torch.equal(mapping, expected[0])
    assert torch.equal(shifts, expected[1])
    assert torch.equal(bits(vectors), bits(expected[2]))


def assert_equal_bits(actual, expected):
    """Two sequences of tensors are equal bit by bit, wherever they are."""
    for ours, theirs in zip(on_cpu(actual), on_cpu(expected), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def assert_list_equals_reference(arguments, cutoff, full):
    """Both orders of the list against the oracle: the sorted one as it is, the other canonically sorted.

    The oracle runs on the CPU: every device is held to the same bits, and no GPU waits for its small steps.
    """
    r, h, flags, index = on_cpu(arguments)
    expected = diffnl.reference.neighbor_pairs(r, h, flags, cutoff, index, full=full, sorted=True)
    return assert_list_equals(expected, arguments, cutoff, full)


def assert_list_equals(expected, arguments, cutoff, full):
    """Both orders of the list against `expected`, which is in order."""
    positions, cell, pbc, system_idx = arguments
    in_order = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=full, sorted=True)
    assert_well_formed(in_order, positions)
    assert_same_bits(in_order, expected)
    fastest = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=full)
    assert_well_formed(fastest, positions)
    assert (fastest.mapping[0].diff() >= 0).all(), "i must ascend"
    assert_same_bits(canonical(fastest), expected)
    return in_order


def as_set(mapping, shifts):
    """{(i, j, S0, S1, S2)}, one for each pair."""
    rows = torch.cat([mapping.T, shifts.to(torch.int64)], dim=1).tolist()
    return {tuple(row) for row in rows}


# ----- gradients -------------------------------------------------------------------------------------------


def adjoint_oracle(g, mapping, shifts, system_idx, num_atoms, num_systems):
    """The adjoint in float64 on the CPU, and how far off rounding in the dtype of `g` may be.

    Returns ((grad_positions, grad_cell), (bound, bound)). n terms added up in any order are off by less than
    n eps sum |g|, and by about sqrt(n) eps sum |g| in an order that does not conspire.
    """
    eps = torch.finfo(g.dtype).eps
    g, mapping, shifts = on_cpu((g, mapping, shifts))
    g, (i, j) = g.double(), mapping
    zeros = torch.zeros(num_atoms, 3, dtype=torch.float64)
    grad_positions = zeros.index_add(0, j, g).index_add(0, i, -g)
    magnitude = zeros.index_add(0, j, g.abs()).index_add(0, i, g.abs())
    count = torch.bincount(mapping.flatten(), minlength=num_atoms)[:, None]

    system = torch.zeros_like(i) if system_idx is None else system_idx.cpu().long()[i]
    outer = shifts.double()[:, :, None] * g[:, None, :]
    zeros = torch.zeros(num_systems, 3, 3, dtype=torch.float64)
    grad_cell = zeros.index_add(0, system, outer)
    cell_magnitude = zeros.index_add(0, system, outer.abs())
    # Added up in float64 from partial sums of a few hundred pairs.
    cell_count = torch.bincount(system, minlength=num_systems).clamp(max=512)[:, None, None]
    bounds = (magnitude, count), (cell_magnitude, cell_count)
    return (grad_positions, grad_cell), tuple(4 * eps * (1 + n).sqrt() * sizes for sizes, n in bounds)


def assert_adjoint(gradients, g, mapping, shifts, system_idx, num_atoms, num_systems):
    """Gradients of positions (N, 3) and cell (3, 3) or (B, 3, 3), either may be None, against the oracle."""
    expected, bounds = adjoint_oracle(g, mapping, shifts, system_idx, num_atoms, num_systems)
    for ours, theirs, bound in zip(gradients, expected, bounds, strict=True):
        if ours is None:
            continue
        assert ours.dtype == g.dtype and ours.device == g.device
        error = (ours.detach().cpu().double().view_as(theirs) - theirs).abs()
        assert (error <= bound).all(), f"{(error > bound).sum()} entries are off, by up to {error.max():.3g}"


def assert_close_sums(ours, theirs):
    """Equal but for the order of the sums, which on a GPU depends on how a list was found."""
    for one, other in zip(ours, theirs, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0.0, atol=100 * torch.finfo(one.dtype).eps * size)
