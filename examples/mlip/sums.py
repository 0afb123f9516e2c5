"""Sums of the pairs' arrays into atoms, and the atoms' arrays at the pairs: each is the other's derivative.

On a GPU torch adds rows in no fixed order, or, asked to be deterministic, sorts the pairs for every single
sum. The list comes in ascending i, and one sort serves all sums over j of a step: each atom's rows are a
segment then, added up in their order by `torch.segment_reduce`. The padding of a list with a capacity is in
no segment.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    """x (N, F) -> x[index] (P, F). `order` sorts `index`; its segments begin at `starts` (N + 1,) then."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
        ctx.save_for_backward(index, order, starts)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Sum.apply(gradient, *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    """y (P, F) -> sums (N, F) of the rows of equal `index`: the adjoint of `_Gather`."""

    @staticmethod
    def forward(ctx, y: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
        ctx.save_for_backward(index, order, starts)
        y = y.contiguous() if order is None else y.index_select(0, order)
        # Not checked (`unsafe`): that would wait for the device, and padding lies behind the last segment.
        return torch.segment_reduce(y, "sum", offsets=starts, axis=0, unsafe=True, initial=0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Gather.apply(gradient, *ctx.saved_tensors), None, None, None


class PairSums:
    """Both directions for one list. `pairs` are diffnl's, in ascending i, padded or not.

    `segments`: by segments, or by torch's `index_add`, whose order is fixed on a CPU. None: as the device.
    """

    def __init__(self, pairs, num_atoms: int, segments: bool | None = None):
        self.mapping, self.num_atoms = pairs.mapping, num_atoms
        self.segments = pairs.mapping.is_cuda if segments is None else segments
        if self.segments:
            i, j = pairs.mapping
            sorted_j, order = torch.sort(j, stable=True)
            atoms = torch.arange(num_atoms + 1, device=i.device)
            bounds = [torch.searchsorted(index.contiguous(), atoms) for index in (i, sorted_j)]
            if (count := getattr(pairs, "num_pairs", None)) is not None:
                # Padding is of the last atom, behind its pairs. A list that failed, count < 0, is summed up
                # whole: NaN.
                end = torch.where(count < 0, i.shape[0], count)
                bounds = [starts.minimum(end) for starts in bounds]
            self.centers, self.neighbors = (i, None, bounds[0]), (j, order, bounds[1])

    def of_neighbors(self, x: Tensor) -> Tensor:
        """(N, F) -> (P, F), the rows x_j."""
        if self.segments:
            return _Gather.apply(x, *self.neighbors)
        return x.index_select(0, self.mapping[1])

    def over_neighbors(self, y: Tensor) -> Tensor:
        """(P, F) -> (N, F), the sums over the pairs of each i."""
        if self.segments:
            return _Sum.apply(y, *self.centers)
        return y.new_zeros(self.num_atoms, y.shape[1]).index_add(0, self.mapping[0], y)
