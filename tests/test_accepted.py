"""Odd input that is accepted: any strides, forms of pbc, open boundaries, extreme cutoffs."""

import math

import numpy as np
import pytest
import torch
from compare import assert_same_bits, assert_well_formed, bits, on_cpu
from systems import SYSTEMS, TRICLINIC, cubic, scatter, tensor

import diffnl

R = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 1.5, 1.0]])
H = 4.0 * torch.eye(3)

ODD = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "every_second": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
}


@pytest.mark.parametrize("layout", ODD)
def test_any_strides(layout, dtype, device):
    positions, cell, pbc, system_idx = SYSTEMS["batch_mixed_pbc"].arguments(dtype, device)
    expected = diffnl.neighbor_pairs(positions, cell, pbc, 5.0, system_idx)
    odd = ODD[layout]
    index = system_idx.repeat_interleave(3)[::3]
    arguments = odd(positions), odd(cell), odd(pbc.byte()).bool(), 5.0, index
    assert any(not t.is_contiguous() or t.storage_offset() for t in (arguments[0], arguments[1]))
    assert_same_bits(diffnl.neighbor_pairs(*arguments), expected)
    mapping = expected.mapping.T.contiguous().T
    again = diffnl.pair_vectors(arguments[0], arguments[1], mapping, odd(expected.shifts), index)
    assert torch.equal(bits(again), bits(expected.vectors))


def test_expanded_inputs(dtype, device):
    cells = tensor(cubic(2.0)).to(device, dtype).expand(3, 3, 3)
    positions = torch.ones(1, 3, dtype=dtype, device=device).expand(4, 3)
    pbc = torch.tensor([[True]], device=device).expand(3, 3)
    owner = torch.tensor([0, 2, 2, 0], device=device)
    pairs = diffnl.neighbor_pairs(positions, cells, pbc, 2.5, owner)
    expected = diffnl.neighbor_pairs(positions.clone(), cells.clone(), pbc.clone(), 2.5, owner)
    assert_same_bits(pairs, expected)
    assert pairs.mapping.shape[1] == 4 * (6 * 2 + 1)


@pytest.mark.parametrize("positions_grad", [False, True])
@pytest.mark.parametrize("cell_grad", [False, True])
def test_requires_grad_on_any_subset(positions_grad, cell_grad, device):
    positions, cell, pbc, system_idx = SYSTEMS["batch"].arguments(torch.float64, device)
    positions.requires_grad_(positions_grad)
    cell.requires_grad_(cell_grad)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, 3.0, system_idx)
    assert_well_formed(pairs, positions)
    assert pairs.vectors.requires_grad == (positions_grad or cell_grad)


PBC = [
    True,
    (True, True, True),
    [True] * 3,
    np.ones(3, dtype=bool),
    torch.ones(3, dtype=torch.bool),
    np.True_,
]
PBC += [torch.tensor(True), torch.ones(1, 3, dtype=torch.bool), tuple(np.ones(3, dtype=bool))]
PBC += [1, np.int64(1), [1, 1, 1], np.ones(3, dtype=int), torch.ones(3, dtype=torch.int64), torch.tensor(1)]
PBC += [torch.ones(1, 3, dtype=torch.uint8), [torch.tensor(True)] * 3]


@pytest.mark.parametrize("pbc", PBC, ids=[f"{n}_{type(p).__name__}" for n, p in enumerate(PBC)])
def test_pbc_in_any_form(pbc, device):
    positions, cell = R.to(device), H.to(device)
    pbc = pbc.to(device) if isinstance(pbc, torch.Tensor) else pbc
    expected = diffnl.neighbor_pairs(positions, cell, torch.tensor([[True] * 3], device=device), 2.0)
    assert_same_bits(diffnl.neighbor_pairs(positions, cell, pbc, 2.0), expected)


@pytest.mark.parametrize("integer", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_dtypes_of_a_list_do_not_matter(integer, dtype, device):
    """uint8 holds no negative shift: its list is one of an open system."""
    positions, cell, _, system_idx = SYSTEMS["batch_interleaved"].arguments(dtype, device)
    pairs = diffnl.neighbor_pairs(positions, cell, integer is not torch.uint8, 5.0, system_idx)
    again = diffnl.pair_vectors(
        positions, cell, pairs.mapping.to(integer), pairs.shifts.to(integer), system_idx.to(integer)
    )
    assert torch.equal(bits(again), bits(pairs.vectors))
    long = diffnl.pair_vectors(positions, cell, pairs.mapping, pairs.shifts.long(), system_idx)
    assert torch.equal(bits(long), bits(pairs.vectors))


def test_pbc_of_integers_says_which_axes(device):
    """As extended xyz files and ASE users have it."""
    positions, cell = R.to(device), H.to(device)
    expected = diffnl.neighbor_pairs(positions, cell, (True, False, True), 4.5)
    for pbc in ([1, 0, 1], np.array([1, 0, 1]), torch.tensor([1, 0, 1], device=device)):
        assert_same_bits(diffnl.neighbor_pairs(positions, cell, pbc, 4.5), expected)
        assert_same_bits(diffnl.NeighborList(4.5)(positions, cell, pbc), expected)


OPEN = [False, (False, False, False), torch.zeros(3, dtype=torch.bool)]


@pytest.mark.parametrize(
    "cell, pbc", [(None, None)] + [(cell, pbc) for cell in (None, H, 0 * H) for pbc in OPEN]
)
def test_open_boundaries(cell, pbc, device):
    cell = None if cell is None else cell.to(device)
    pbc = pbc.to(device) if isinstance(pbc, torch.Tensor) else pbc
    pairs = diffnl.NeighborList(9.0)(R.to(device), cell, pbc)
    assert pairs.mapping.tolist() == [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]]
    assert not pairs.shifts.any()


def test_molecules_in_a_batch_need_no_cells(device):
    owner = torch.tensor([1, 0, 1], device=device)
    pairs = diffnl.NeighborList(9.0)(R.to(device), system_idx=owner)
    assert pairs.mapping.tolist() == [[0, 2], [2, 0]]


def test_the_smallest_and_largest_shifts_of_a_list(device):
    """-2**31 and 2**31 - 1 fit int32, whatever integers they come in."""
    ends = torch.tensor([[-(2**31), 0, 2**31 - 1]], device=device)
    cell = torch.eye(3, dtype=torch.float64, device=device)
    positions, mapping = (
        torch.zeros(1, 3, dtype=torch.float64, device=device),
        torch.zeros_like(ends[:, :2].T),
    )
    vectors = diffnl.pair_vectors(positions, cell, mapping, ends)
    assert vectors.tolist() == [[-(2.0**31), 0.0, 2.0**31 - 1.0]]


def test_cutoffs_whose_square_leaves_the_dtype(dtype, device):
    """Tiny: the square is 0 and nothing is closer. Huge: the square is infinite and everything is."""
    positions = R.to(device, dtype).repeat(2, 1)
    for cutoff in (1e-25, 1e-200):
        count = diffnl.neighbor_pairs(positions, None, None, cutoff).mapping.shape[1]
        assert count == (0 if torch.tensor(cutoff * cutoff, dtype=dtype) == 0 else 6)
    for cutoff in (1e30, 1e200):
        assert diffnl.neighbor_pairs(positions, None, None, cutoff).mapping.shape[1] == 6 * 5
    assert math.isinf(1e200 * 1e200)


def test_far_positions_are_listed_exactly_or_refused(dtype, device):
    """One atom ever further out: the same pairs as the oracle, then the same refusal, never a wrong list."""
    outcomes = []
    for exponent in range(20):
        positions = scatter(4, TRICLINIC, exponent)
        positions[2] += 10.0**exponent * tensor([0.3, -1.0, 0.7])
        arguments = positions.to(device, dtype), tensor(TRICLINIC).to(device, dtype), True, 5.0
        try:
            expected = diffnl.reference.neighbor_pairs(*on_cpu(arguments), sorted=True)
        except ValueError as error:
            with pytest.raises(ValueError) as caught:
                diffnl.neighbor_pairs(*arguments)
            assert str(caught.value) == str(error)
            outcomes.append("refused")
        else:
            assert_same_bits(diffnl.neighbor_pairs(*arguments, sorted=True), expected)
            outcomes.append("listed")
    listed = outcomes.count("listed")
    assert outcomes == ["listed"] * listed + ["refused"] * (20 - listed)
    assert 4 <= listed <= 14


def test_lengths_near_the_end_of_float32(device):
    """Where four times a squared distance overflows and the squared distance does not."""
    positions = torch.tensor([[0.0, 0.0, 0.0], [1.5e19, 0.0, 0.0]], device=device)
    pairs = diffnl.neighbor_pairs(positions, None, None, 1.6e19)
    oracle = diffnl.reference.neighbor_pairs(positions, None, None, 1.6e19)
    assert pairs.mapping.tolist() == oracle.mapping.tolist() == [[0, 1], [1, 0]]
