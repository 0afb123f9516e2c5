"""The differentiable operators.

With the pairs fixed, the vectors are linear in positions r and cell h:

    v_p = (r_j - r_i) + S_p @ h                                              PairVectors
    grad r_k = sum_{j_p = k} g_p - sum_{i_p = k} g_p,
    grad h_b = sum_{p in b} outer(S_p, g_p)                                  PairVectorsAdjoint

Each of the two maps is the other's backward, so derivatives of every order exist; forward mode applies a map
to the tangents. `Search` finds the pairs and writes the same vectors: its backward is PairVectorsAdjoint,
its forward mode PairVectors. None of them saves a float: a linear map's derivative needs only the list.

A list is four tensors, in one of two forms: (mapping, shifts, system_idx, num_pairs), where num_pairs is None
unless the list is padded, or from `LinkedSearch`, on a GPU, (links, rows, system_idx, None), which is a third
of the memory and knows the reverse of each pair.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from . import _ops, _validate
from ._torch_compat import apply_directly, transforms_active


class _Operator(Function):
    """A Function whose `call` is its `apply` without the 10 to 40 us that go into binding arguments to their
    names: all are positional here."""

    @classmethod
    def call(cls, *args):
        if torch.compiler.is_compiling():
            if transforms_active():
                raise _validate.not_in_compiled_transforms()
            return cls.forward(*args)  # whose operator a compiler can differentiate by itself: see below
        if transforms_active():
            return cls.apply(*args)
        return apply_directly(cls, *args)


def _without_cell(pair_list):
    """What is left of a list where no cell takes part: the shifts and systems do not matter."""
    first, second, _, num_pairs = pair_list
    return first, second if _ops.is_linked(first) else None, None, num_pairs


def _save_shapes(ctx, positions: Tensor, cell: Tensor | None, num_systems: int) -> None:
    """What `_gradients` needs of the inputs of a map to vectors."""
    ctx.sizes = positions.shape[0], num_systems
    ctx.cell_shape = None if cell is None else cell.shape
    ctx.set_materialize_grads(False)


def _save_list(ctx, *pair_list, uses_cell: bool) -> None:
    """Keeps of a list what the other map needs."""
    ctx.save_for_backward(*(pair_list if uses_cell else _without_cell(pair_list)))
    ctx.save_for_forward(*pair_list)


def _vmap_loop(function: type[_Operator], info, in_dims, args, mapped: int):
    """Applies a linear map to each entry of a batch of tangents; the first `mapped` arguments may be batched.

    A loop, not one long list: the list is shared by all entries, and each application runs on all threads.
    """
    if any(dim is not None for dim in in_dims[mapped:]):
        raise NotImplementedError(
            f"{function.__name__} cannot be vmapped over a list: pairs differ in number from one list to the "
            "next. Batch the systems with `system_idx` and a (B, 3, 3) `cell` instead"
        )
    rows = []
    for n in range(info.batch_size):
        entry = [a if d is None else a.select(d, n) for a, d in zip(args[:mapped], in_dims, strict=False)]
        rows.append(function.call(*entry, *args[mapped:]))
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])
    return torch.stack(rows), 0


class PairVectors(_Operator):
    """positions (N, 3), cell (B, 3, 3) or None, list -> vectors (P, 3)."""

    @staticmethod
    def forward(positions, cell, *pair_list):
        return _ops.vectors_of_list(positions, cell, *pair_list)

    @staticmethod
    def setup_context(ctx, inputs, output):
        positions, cell, *pair_list = inputs
        _save_shapes(ctx, positions, cell, _num_systems(pair_list, positions.shape[0], cell))
        _save_list(ctx, *pair_list, uses_cell=cell is not None and ctx.needs_input_grad[1])

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(ctx, grad), None, None, None, None

    @staticmethod
    def jvp(ctx, positions, cell, *_):
        return _tangent(ctx, positions, cell)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_loop(PairVectors, info, in_dims, args, mapped=2)


class PairVectorsAdjoint(_Operator):
    """grad (P, 3), list -> gradients (N, 3) and (B, 3, 3); one that is not needed has no rows."""

    @staticmethod
    def forward(grad, first, second, system_idx, num_pairs, *sizes_and_needs):
        return _ops.adjoint_of_list(grad, first, second, system_idx, num_pairs, *sizes_and_needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, first, second, system_idx, num_pairs, *ctx.sizes_and_needs = inputs
        ctx.set_materialize_grads(False)
        _save_list(ctx, first, second, system_idx, num_pairs, uses_cell=ctx.sizes_and_needs[3])

    @staticmethod
    def backward(ctx, grad_positions, grad_cell):
        num_atoms, _, need_positions, need_cell = ctx.sizes_and_needs
        grad_positions = grad_positions if need_positions else None
        grad_cell = grad_cell if need_cell else None
        vectors = _apply_to(grad_positions, grad_cell, ctx.saved_tensors, num_atoms)
        return vectors, *[None] * 8

    @staticmethod
    def jvp(ctx, grad, *_):
        if grad is None:
            return None, None
        return PairVectorsAdjoint.call(grad, *ctx.saved_tensors, *ctx.sizes_and_needs)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_loop(PairVectorsAdjoint, info, in_dims, args, mapped=1)


class Search(_Operator):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3), ... -> mapping (2, P), shifts (P, 3), vectors (P, 3)."""

    @staticmethod
    def forward(positions, cell, pbc, system_idx, cutoff, full, sorted):
        return _ops.neighbor_pairs(positions, cell, pbc, system_idx, cutoff, full, sorted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mapping, shifts, _ = output
        _set_up_search(ctx, inputs, output, mapping, shifts, inputs[3], None)

    @staticmethod
    def backward(ctx, _mapping, _shifts, grad, *_):
        return *_gradients(ctx, grad), *[None] * ctx.num_options

    @staticmethod
    def jvp(ctx, positions, cell, *_):
        return None, None, _tangent(ctx, positions, cell), *[None] * ctx.num_extras

    @staticmethod
    def vmap(info, in_dims, *args):
        raise NotImplementedError(
            "the neighbour search cannot be vmapped over positions or cells: systems differ in their number "
            "of pairs. Search them all in one call with `system_idx` and a (B, 3, 3) `cell`"
        )


class LinkedSearch(Search):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3), ... -> what Search returns for a full list, links, rows.

    The backward keeps the links, not mapping and shifts, which are then freed as soon as nobody holds them.
    """

    @staticmethod
    def forward(positions, cell, pbc, system_idx, cutoff, sorted):
        return _ops.linked_neighbor_pairs(positions, cell, pbc, system_idx, cutoff, sorted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mapping, shifts, _, links, rows = output
        count = links.shape[0]
        linked = isinstance(count, torch.SymInt) or count > 0
        pair_list = (links, rows) if linked else (mapping, shifts)
        _set_up_search(ctx, inputs, output, *pair_list, inputs[3], None)


class PaddedSearch(Search):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3), ... -> mapping (2, C), shifts (C, 3), vectors (C, 3),
    num_pairs ()."""

    @staticmethod
    def forward(positions, cell, pbc, system_idx, cutoff, capacity, full, sorted):
        return _ops.padded_neighbor_pairs(positions, cell, pbc, system_idx, cutoff, capacity, full, sorted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mapping, shifts, _, num_pairs = output
        _set_up_search(ctx, inputs, output, mapping, shifts, inputs[3], num_pairs)


class LinkedPaddedSearch(Search):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3), ... -> a full list as PaddedSearch, links, rows."""

    @staticmethod
    def forward(positions, cell, pbc, system_idx, cutoff, capacity, sorted):
        return _ops.padded_linked_neighbor_pairs(positions, cell, pbc, system_idx, cutoff, capacity, sorted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, links, rows = output
        _set_up_search(ctx, inputs, output, links, rows, inputs[3], None)


class Selection(Search):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3), ..., candidates, jumps -> mapping (2, P), shifts (P, 3),
    vectors (P, 3), num_pairs (); with a capacity, a padded list."""

    @staticmethod
    def forward(positions, cell, pbc, system_idx, candidates, jumps, cutoff, capacity):
        return _ops.select_candidates(positions, cell, system_idx, candidates, jumps, cutoff, capacity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mapping, shifts, _, num_pairs = output
        capacity = inputs[-1]
        _set_up_search(
            ctx, inputs, output, mapping, shifts, inputs[3], None if capacity is None else num_pairs
        )


class Found(Search):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3), ..., their list, found without derivatives -> that list:
    mapping (2, P), shifts (P, 3), vectors (P, 3), and num_pairs (), links (P,), rows, or None for these."""

    @staticmethod
    def forward(positions, cell, pbc, system_idx, found):
        return found

    @staticmethod
    def setup_context(ctx, inputs, output):
        mapping, shifts, _, num_pairs, links, rows = output
        linked = rows is not None and rows.shape[0] > 0
        pair_list = (links, rows, inputs[3], None) if linked else (mapping, shifts, inputs[3], num_pairs)
        _set_up_search(ctx, inputs, output, *pair_list)


def _set_up_search(ctx, inputs, output, *pair_list) -> None:
    """What the backward of a search needs. Of its outputs, the third is the vectors."""
    positions, cell, *options = inputs
    mapping, shifts, _, *extras = output
    ctx.num_options, ctx.num_extras = len(options), len(extras)
    _save_shapes(ctx, positions, cell, _validate.num_systems(cell))
    ctx.mark_non_differentiable(mapping, shifts, *(extra for extra in extras if extra is not None))
    _save_list(ctx, *pair_list, uses_cell=ctx.needs_input_grad[1])


def _num_systems(pair_list, num_atoms: int, cell: Tensor | None) -> int:
    """B; 0 where it is not known and does not matter."""
    first, second, *_ = pair_list
    if _ops.is_linked(first):
        return second.shape[0] - 2 * num_atoms - 2
    return 0 if cell is None else _validate.num_systems(cell)


def nobody_differentiates(*inputs: Tensor) -> bool:
    """Whether nobody differentiates, vmaps or pushes tangents through an operator of these inputs: then the
    bare operator does, without the cost of a Function."""
    return not (
        (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
        or transforms_active()
        or any(unpack_dual(t).tangent is not None for t in inputs)
    )


def wants_links(positions: Tensor, cell: Tensor) -> bool:
    """Whether a backward may follow that runs from links."""
    return (
        positions.device.type in _ops.LINKED_DEVICES
        and torch.is_grad_enabled()
        and (positions.requires_grad or cell.requires_grad)
    )


def _gradients(ctx, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of positions and cell, for a ctx that holds (sizes, list) of a map to vectors."""
    need_positions, need_cell = ctx.needs_input_grad[:2]
    if grad is None or not (need_positions or need_cell):
        return None, None
    adjoint = _ops.adjoint_of_list if nobody_differentiates(grad) else PairVectorsAdjoint.call
    grad_positions, grad_cell = adjoint(grad, *ctx.saved_tensors, *ctx.sizes, need_positions, need_cell)
    return grad_positions if need_positions else None, grad_cell.view(ctx.cell_shape) if need_cell else None


def _tangent(ctx, positions: Tensor | None, cell: Tensor | None) -> Tensor | None:
    return _apply_to(positions, cell, ctx.saved_tensors, ctx.sizes[0])


def _apply_to(positions: Tensor | None, cell: Tensor | None, pair_list, num_atoms: int) -> Tensor | None:
    """PairVectors of tangents that may be absent; `cell` (3, 3) or (B, 3, 3)."""
    if positions is None and cell is None:
        return None
    if positions is None:
        positions = cell.new_zeros((num_atoms, 3))
    if cell is None:
        pair_list = _without_cell(pair_list)
    return PairVectors.call(positions, cell, *pair_list)


# Compilers do not trace a Function that has a forward mode. They meet the bare operators instead, with the
# same derivatives. Eager calls never come here: `_ops` passes this by.


def _register(operator: str, function: type[_Operator], num_inputs: int, as_inputs) -> None:
    """`as_inputs` makes the inputs of the function, the first ones alike, of those of the operator."""

    def setup_context(ctx, inputs, output):
        function.setup_context(ctx, as_inputs(*inputs), output)

    def backward(ctx, *grads):
        gradients = function.backward(ctx, *grads)
        return (*gradients, *[None] * num_inputs)[:num_inputs]

    torch.library.register_autograd(f"diffnl::{operator}", backward, setup_context=setup_context)


def _same(*inputs):
    return inputs


_register("neighbor_pairs", Search, 7, _same)
_register("linked_neighbor_pairs", LinkedSearch, 6, _same)
_register("padded_neighbor_pairs", PaddedSearch, 8, _same)
_register("padded_linked_neighbor_pairs", LinkedPaddedSearch, 7, _same)
_register("pair_vectors", PairVectors, 6, _same)
_register("linked_vectors", PairVectors, 5, lambda *inputs: (*inputs, None))
_register(
    "pair_vectors_adjoint", PairVectorsAdjoint, 9, lambda *inputs: (*inputs[:4], inputs[8], *inputs[4:8])
)
_register("linked_adjoint", PairVectorsAdjoint, 8, lambda *inputs: (*inputs[:4], None, *inputs[4:]))
