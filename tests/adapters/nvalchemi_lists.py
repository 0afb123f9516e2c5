"""Structures as nvalchemi-toolkit-ops takes them, and its lists compared."""

import numpy as np
import torch
from structures import STRUCTURES, canonical

METHODS = ["naive", "cell_list"]


def tensors(atoms, dtype=torch.float64):
    positions, cell = (torch.tensor(x, dtype=dtype) for x in (atoms.positions, atoms.cell.array))
    if not atoms.pbc.any():
        return positions, None, None
    return positions, cell, torch.tensor(atoms.pbc)


def batch(names, dtype=torch.float64):
    """Positions, cells, pbc, and where each system begins and ends."""
    parts = [STRUCTURES[name] for name in names]
    positions = torch.tensor(np.concatenate([x.positions for x in parts]), dtype=dtype)
    cell = torch.tensor(np.stack([x.cell.array for x in parts]), dtype=dtype)
    ptr = torch.tensor(np.cumsum([0] + [len(x) for x in parts]), dtype=torch.int32)
    return positions, cell, torch.tensor(np.stack([x.pbc for x in parts])), ptr


def index_of(ptr):
    return torch.repeat_interleave(torch.arange(len(ptr) - 1, dtype=torch.int32), ptr.diff())


def coo(found, *more):
    """Sorted pairs of a list in COO form; open lists may come without shifts."""
    shifts = found[2] if len(found) > 2 else torch.zeros(found[0].shape[1], 3)
    return canonical(*found[0], shifts, *more)


def assert_same(ours, theirs):
    for mine, other in zip(coo(ours), coo(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)


def assert_same_kind(ours, theirs):
    """Shapes, dtypes and devices, place by place."""
    assert [(x.shape, x.dtype, x.device) for x in ours] == [(x.shape, x.dtype, x.device) for x in theirs]


def pairs_of_matrix(matrix, number, shifts=None):
    rows, slots = torch.nonzero(torch.arange(matrix.shape[1]) < number[:, None], as_tuple=True)
    listed = torch.stack([rows.to(torch.int32), matrix[rows, slots]])
    return (listed, None) if shifts is None else (listed, None, shifts[rows, slots])
