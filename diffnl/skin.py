"""A list that is searched again only when a pair could have been missed.

Candidates to cutoff + skin are kept from one search. While they are known to hold every pair (the criterion
and its proof: csrc/candidates_cpu.cpp), a call selects from them by the exact test, with the positions and
cell of that call: the same pairs, bits and gradients as a fresh list.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops, _validate
from .autograd import Selection, nobody_differentiates, transforms_active


@dataclass(frozen=True)
class _Candidates:
    """A search and what it was for."""

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    system_idx: Tensor | None
    options: tuple  # cutoff, skin, full
    compact: tuple[Tensor, ...]

    def answer(
        self, positions: Tensor, cell: Tensor, pbc: Tensor, system_idx: Tensor | None, options
    ) -> bool:
        """Whether all pairs of this input are among the candidates."""
        return (
            self.options == options
            and self.positions.shape == positions.shape
            and self.positions.dtype == positions.dtype
            and self.cell.shape == cell.shape
            and torch.equal(self.pbc, pbc)
            and (self.system_idx is None) == (system_idx is None)
            and (system_idx is None or torch.equal(self.system_idx, system_idx))
            and _ops.candidates_hold(
                self.positions, self.cell, positions, cell, pbc, system_idx, options[0], sum(options[:2])
            )
        )


class Skin:
    """What a layer keeps between calls. Copies and pickles start empty; threads may share it: what is kept is
    never changed, only replaced.

    Attributes:
        searches, reuses: how many calls searched anew, and how many did not.
    """

    def __init__(self) -> None:
        self.searches = self.reuses = 0
        self._candidates: _Candidates | None = None

    def __reduce__(self):
        return Skin, ()

    def find(self, positions, cell, pbc, system_idx, cutoff: float, skin: float, full: bool, capacity):
        """mapping, shifts, vectors, num_pairs of the sorted list; None where only a fresh search will do.

        The inputs are checked and on the CPU.
        """
        if torch.compiler.is_compiling() or transforms_active() or not _ops.HAS_CANDIDATES:
            return None
        now = positions.detach(), cell.detach(), pbc, system_idx
        options = cutoff, skin, full
        kept = self._candidates
        if kept is not None and kept.answer(*now, options):
            self.reuses += 1
        else:
            self.searches += 1
            kept = self._candidates = _search(*now, options)
        inputs = positions, cell, pbc, system_idx, *kept.compact, cutoff, capacity
        if nobody_differentiates(positions, cell):
            return Selection.forward(*inputs)
        return Selection.call(*inputs)


def _search(positions, cell, pbc, system_idx, options) -> _Candidates:
    cutoff, skin, full = options
    mapping, shifts, _ = _ops.neighbor_pairs(positions, cell, pbc, system_idx, cutoff + skin, full, True)
    compact = _ops.compact_candidates(
        mapping, shifts, system_idx, positions.shape[0], _validate.num_systems(cell)
    )

    # Positions and cells may be changed in place before the next call.
    def own(tensor):
        return None if tensor is None else tensor.clone()

    return _Candidates(own(positions), own(cell), own(pbc), own(system_idx), options, compact)
