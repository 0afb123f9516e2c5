"""What the operators return, in shapes alone: for torch.compile, torch.export and fake tensors."""

import torch

from . import _ops, _validate


def _list_of_unknown_length(positions):
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        positions.new_empty((2, num_pairs), dtype=torch.int64),
        positions.new_empty((num_pairs, 3), dtype=torch.int32),
        positions.new_empty((num_pairs, 3)),
    )


@torch.library.register_fake("diffnl::neighbor_pairs")
def _(positions, cell, pbc, system_idx, cutoff, full=True, sorted=False):
    return _list_of_unknown_length(positions)


@torch.library.register_fake("diffnl::neighbor_lists")
def _(positions, cell, pbc, system_idx, cutoffs, full=True, sorted=False):
    return [tensor for _ in cutoffs for tensor in _list_of_unknown_length(positions)]


@torch.library.register_fake("diffnl::pair_vectors")
def _(positions, cell, mapping, shifts, system_idx=None, num_pairs=None):
    return positions.new_empty((mapping.shape[1], 3))


@torch.library.register_fake("diffnl::pair_vectors_adjoint")
def _(
    grad,
    mapping,
    shifts,
    system_idx,
    num_atoms,
    num_systems,
    need_positions=True,
    need_cell=True,
    num_pairs=None,
):
    return (
        grad.new_empty((num_atoms if need_positions else 0, 3)),
        grad.new_empty((num_systems if need_cell else 0, 3, 3)),
    )


@torch.library.register_fake("diffnl::linked_neighbor_pairs")
def _(positions, cell, pbc, system_idx, cutoff, sorted=False):
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    num_rows = _ops.num_rows(positions.shape[0], _validate.num_systems(cell))
    return (
        positions.new_empty((2, num_pairs), dtype=torch.int64),
        positions.new_empty((num_pairs, 3), dtype=torch.int32),
        positions.new_empty((num_pairs, 3)),
        positions.new_empty((num_pairs,), dtype=torch.int64),
        positions.new_empty((num_rows,), dtype=torch.int64),
    )


@torch.library.register_fake("diffnl::padded_neighbor_pairs")
def _(positions, cell, pbc, system_idx, cutoff, capacity, full=True, sorted=False):
    return (
        positions.new_empty((2, capacity), dtype=torch.int64),
        positions.new_empty((capacity, 3), dtype=torch.int32),
        positions.new_empty((capacity, 3)),
        positions.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("diffnl::padded_linked_neighbor_pairs")
def _(positions, cell, pbc, system_idx, cutoff, capacity, sorted=False):
    num_rows = _ops.num_rows(positions.shape[0], _validate.num_systems(cell))
    return (
        positions.new_empty((2, capacity), dtype=torch.int64),
        positions.new_empty((capacity, 3), dtype=torch.int32),
        positions.new_empty((capacity, 3)),
        positions.new_empty((), dtype=torch.int64),
        positions.new_empty((capacity,), dtype=torch.int64),
        positions.new_empty((num_rows,), dtype=torch.int64),
    )


@torch.library.register_fake("diffnl::linked_vectors")
def _(positions, cell, links, rows, system_idx=None):
    return positions.new_empty((links.shape[0], 3))


@torch.library.register_fake("diffnl::linked_adjoint")
def _(grad, links, rows, system_idx, num_atoms, num_systems, need_positions=True, need_cell=True):
    return (
        grad.new_empty((num_atoms if need_positions else 0, 3)),
        grad.new_empty((num_systems if need_cell else 0, 3, 3)),
    )
