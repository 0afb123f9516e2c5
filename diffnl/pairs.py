"""What a search returns: pairs, as many as there are or padded to a fixed number."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _validate
from .autograd import transforms_active


class _PairFields(NamedTuple):
    mapping: Tensor
    shifts: Tensor
    vectors: Tensor


class _PaddedFields(NamedTuple):
    mapping: Tensor
    shifts: Tensor
    vectors: Tensor
    num_pairs: Tensor


class _WithDistances:
    @property
    def distances(self) -> Tensor:
        """(P,) |v|, in the length unit of the positions; computed on first use.

        Differentiable, with zero first and second derivatives (instead of NaN) where v = 0. Lengths whose
        squares leave the dtype are as exact as others.
        """
        vectors = self.vectors
        if torch.compiler.is_compiling() or vectors.is_inference():
            # A compiler finds out by itself what it has computed already. Of what is made in inference mode
            # nobody can tell whether it has been changed in place since.
            return _norm(vectors)
        of_version, version, kept = self.__dict__.get("_distances", (None, None, None))
        usable = (
            kept is not None
            and of_version == vectors._version
            and version == kept._version
            # What was computed without a graph must not stand in for a differentiable value later.
            and (kept.requires_grad or not (torch.is_grad_enabled() and vectors.requires_grad))
        )
        if not usable:
            kept = _norm(vectors)
            if not kept.is_inference():
                self.__dict__["_distances"] = vectors._version, kept._version, kept
        return kept


class Pairs(_WithDistances, _PairFields):
    """The pairs of a neighbour list: a named tuple of three tensors on the device of the positions.

    Attributes:
        mapping: (2, P) int64. Row 0 is i, the centre; row 1 is j, the neighbour.
        shifts: (P, 3) int32. S, the number of lattice vectors between the images of i and j.
        vectors: (P, 3), dtype of the positions, in their length unit. v = (r_j - r_i) + S @ h; differentiable
            with respect to positions and cell.
    """


class PaddedPairs(_WithDistances, _PaddedFields):
    """Pairs in tensors of a fixed size, C = `capacity`, made without waiting for the device.

    The first P slots hold the pairs of `Pairs`, bit for bit. Each slot behind holds the last atom with
    itself, S = 0 and the vector (cutoff, 0, 0), at which a smooth envelope is 0. Whatever a model makes of
    it, its gradient is 0.

    More than C pairs, or bad input, never pass for a list: all vectors of that call are NaN, and so are the
    derivatives taken through them; `check()` says why. A model can lose that NaN: torch.where(d < c, f(d), 0)
    turns it into 0, and with C = 0 there is no vector to be NaN. So multiply the energy with `ok`, which is
    NaN then too: `energy = energy * pairs.ok`.

    Attributes:
        mapping: (2, C) int64. Row 0 is i, the centre; row 1 is j, the neighbour. Valid indices in every slot.
        shifts: (C, 3) int32. S, the number of lattice vectors between the images of i and j.
        vectors: (C, 3), dtype of the positions, in their length unit. v = (r_j - r_i) + S @ h; differentiable
            with respect to positions and cell.
        num_pairs: () int64. P; more than C if more were needed; negative for bad input.
    """

    @property
    def ok(self) -> Tensor:
        """() dtype of the vectors: 1, or NaN where the list has failed. On the device, without any wait.

        For `energy = energy * pairs.ok`, which is NaN for a failed list, whatever the model does with vectors
        that are NaN, and so are its gradients.
        """
        failed = (self.num_pairs < 0) | (self.num_pairs > self.shifts.shape[0])
        return self.vectors.new_ones(()).masked_fill(failed, torch.nan)

    @property
    def mask(self) -> Tensor:
        """(C,) bool, true for pairs and false for padding. All true where the list has failed, so that a mask
        hides no NaN."""
        slots = torch.arange(self.shifts.shape[0], device=self.shifts.device)
        return (slots < self.num_pairs) | (self.num_pairs < 0)

    def check(self) -> "PaddedPairs":
        """Raises what the search without `capacity` would have raised, or a ValueError for more than C pairs.

        Waits for the device; call it as often as you like to wait. Returns the pairs themselves.
        """
        if self.num_pairs.is_meta:
            raise ValueError("`check()` must have values to look at; got a list on the meta device")
        num_pairs, capacity = int(self.num_pairs), self.shifts.shape[0]
        if num_pairs > capacity:
            raise _validate.overflow(num_pairs, capacity)
        if num_pairs < 0:
            raise _validate.padded_error(-num_pairs, *self.__dict__.get("_inputs", (None, None, None)))
        return self

    def _of(self, *inputs: Tensor | None) -> "PaddedPairs":
        """The same with positions, cell and system_idx at hand, for the words of `check()`."""
        self._inputs = inputs
        return self


# Squares between the first two keep all their digits, and so does what a backward makes of them. The third is
# a power of two that takes the lengths below there, subnormal ones included; its inverse takes those above.
_SQUARES = {
    torch.float32: (2.0**-100, 2.0**120, 2.0**80),
    torch.float64: (2.0**-960, 2.0**1000, 2.0**700),
}


def _norm(vectors: Tensor) -> Tensor:
    """(P,) the square root of (x² + y²) + z², with vectors that are too short or too long for that scaled."""
    smallest, largest, factor = _SQUARES[vectors.dtype]
    if vectors.device.type == "cpu" and _validate.has_values(vectors) and not transforms_active():
        squared = vectors.square().sum(-1)
        if squared.shape[0] == 0:
            return squared.sqrt()
        low, high = torch.aminmax(squared.detach())
        if smallest <= low.item() and high.item() <= largest:
            return squared.sqrt()
    squared = vectors.detach().square().sum(-1)
    scale = torch.ones_like(squared).masked_fill(squared < smallest, factor)
    scale = scale.masked_fill(squared > largest, 1.0 / factor)
    squared = (vectors * scale.unsqueeze(-1)).square().sum(-1)
    zero = squared == 0
    # sqrt is taken of 1 where v = 0, so that no infinite slope is ever multiplied by zero.
    return squared.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0) / scale
