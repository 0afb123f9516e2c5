"""Comparing lists: canonical order, equality to the bit, and sets of pairs."""

import torch

import diffnl


def order(mapping, shifts):
    """The permutation that puts pairs into ascending (i, j, S)."""
    permutation = torch.arange(mapping.shape[1], device=mapping.device)
    for key in (*shifts.flip(1).T, mapping[1], mapping[0]):
        permutation = permutation[torch.argsort(key[permutation], stable=True)]
    return permutation


def canonical(pairs):
    """(mapping, shifts, vectors) in ascending (i, j, S)."""
    permutation = order(pairs.mapping, pairs.shifts)
    return pairs.mapping[:, permutation], pairs.shifts[permutation], pairs.vectors.detach()[permutation]


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
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(bits(actual[2]), bits(expected[2]))


def assert_list_equals_reference(arguments, cutoff, full):
    """Both orders of the list against the oracle: the sorted one as it is, the other canonically sorted."""
    positions, cell, pbc, system_idx = arguments
    expected = diffnl.reference.neighbor_pairs(
        positions, cell, pbc, cutoff, system_idx, full=full, sorted=True
    )
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
