"""A list that is searched again only when a pair could have been missed.

Candidates to cutoff + skin are kept from one search. While they are known to hold every pair (the criterion
and its proof: csrc/drift.h), a call selects from them by the exact test, with the positions and cell of that
call: the same pairs and bits as a fresh sorted list, and gradients of what the call was given.

On the CPU the host asks whether they hold. On a GPU the device does, and the answer comes with the number of
pairs; with a capacity nobody on the host learns it, and the device searches by itself.
"""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops, _validate
from .autograd import Found, Selection, nobody_differentiates, transforms_active, wants_links


@dataclass(frozen=True)
class _Candidates:
    """A search and what it was for."""

    inputs: tuple  # positions, cell, pbc, system_idx
    options: tuple  # what the host can compare
    found: tuple[Tensor, ...]
    stream: int = 0

    def fit(self, options: tuple, device: torch.device) -> bool:
        """What another stream writes may still be on its way; whoever captures a graph has waited for it."""
        return self.options == options and (self.stream == _stream(device) or _validate.is_capturing(device))


class Skin:
    """What a layer keeps between calls. Copies and pickles start empty; threads may share it: what is kept on
    the CPU is never changed, only replaced, and on a GPU each thread has its own.

    Attributes:
        searches, reuses: how many calls searched anew, and how many did not. With a capacity on a GPU,
            reading them waits for the device.
    """

    def __init__(self) -> None:
        self._counts = [0, 0]
        self._tallies: dict[torch.device, Tensor] = {}
        self._candidates: _Candidates | None = None
        self._of_thread = threading.local()
        self._captured: list[_Candidates] = []

    def __reduce__(self):
        return Skin, ()

    @property
    def searches(self) -> int:
        return self._counts[0] + sum(int(tally[0]) for tally in self._tallies.values())

    @property
    def reuses(self) -> int:
        return self._counts[1] + sum(int(tally[1]) for tally in self._tallies.values())

    def find(self, where: tuple, cutoffs: tuple[float, ...], skin: float, full: bool, capacity: int | None):
        """mapping, shifts, vectors, num_pairs of the sorted list for each cutoff; None where only a fresh
        search will do.

        `where`: positions, cell, pbc, system_idx, checked. With a capacity there is one cutoff. Raises the
        ValueErrors of a search; on a GPU with a capacity, none.
        """
        positions, cell, pbc, system_idx = where
        if (
            # Who traces or fakes operators must not be given what was found by another call.
            _validate.is_traced() or transforms_active() or positions.shape[0] == 0
        ):
            return None
        now = positions.detach(), cell.detach(), pbc, system_idx
        if positions.device.type not in _ops.LINKED_DEVICES:
            return self._find_on_cpu(where, now, cutoffs, skin, full, capacity)
        linked = full and wants_links(positions, cell)
        if capacity is None:
            lists = self._find_on_gpu(now, cutoffs, skin, full, linked)
        else:
            lists = [self._find_padded_on_gpu(now, cutoffs[0], skin, full, linked, capacity)]
        if lists is None:
            return None
        if not nobody_differentiates(positions, cell):
            lists = [Found.call(*where, found) for found in lists]
        return [found[:4] for found in lists]

    def _find_on_cpu(self, where: tuple, now: tuple, cutoffs, skin, full, capacity):
        longest = max(cutoffs)
        options = longest, skin, full
        kept = self._candidates
        margins = None if kept is None or kept.options != options else _margins(kept, now)
        reused = margins is not None and bool((margins >= 0).all())
        self._counts[reused] += 1
        if not reused:
            kept = self._candidates = _search_on_cpu(now, options, kept, margins)
        select = Selection.forward if nobody_differentiates(*where[:2]) else Selection.call
        return [select(*where, *kept.found, cutoff, capacity) for cutoff in cutoffs]

    def _find_on_gpu(self, now: tuple, cutoffs, skin, full, linked):
        radius = max(cutoffs) + skin
        device, options = now[0].device, (radius, full, *_shapes(now))
        kept = getattr(self._of_thread, "candidates", None)
        lists = None
        if kept is not None and kept.fit(options, device):
            if not kept.found:
                return None
            lists = self._select(now, kept, cutoffs, radius, full, linked, ask=True)
        self._counts[lists is not None] += 1
        if lists is None:
            links, rows = _ops.search_candidates(*now, radius)
            # Whose pairs cannot be linked is searched every time.
            compact = (links, rows) if rows.shape[0] > 0 else ()
            kept = _Candidates(tuple(map(_own, now)), options, compact, _stream(device))
            self._of_thread.candidates = kept
            if compact:
                lists = self._select(now, kept, cutoffs, radius, full, linked, ask=False)
        return lists

    @staticmethod
    def _select(now, kept: _Candidates, cutoffs, radius, full, linked, ask: bool):
        """A list for each cutoff; None if it turns out that the candidates do not hold all pairs."""
        lists: dict = {}
        for cutoff in sorted(set(cutoffs), reverse=True):
            # Who holds the pairs of the longest holds the others.
            first = ask and not lists
            count, *found = _ops.select_linked(
                now, (*kept.inputs, *kept.found), cutoff, radius, full, linked, first
            )
            if count < 0:
                return None
            mapping, shifts, vectors, links, rows = found
            lists[cutoff] = mapping, shifts, vectors, None, links, rows
        return [lists[cutoff] for cutoff in cutoffs]

    def _find_padded_on_gpu(self, now: tuple, cutoff, skin, full, linked, capacity):
        device, options = now[0].device, (cutoff, skin, full, capacity, *_shapes(now))
        kept = getattr(self._of_thread, "padded", None)
        if kept is None or not kept.fit(options, device):
            kept = self._of_thread.padded = self._make_room(now, options)
        if _validate.is_capturing(device) and all(kept is not other for other in self._captured):
            self._captured.append(kept)  # a graph writes to it for as long as it is replayed
        arguments = (*kept.inputs, *kept.found)
        return _ops.padded_select_linked(now, arguments, cutoff, cutoff + skin, capacity, full, linked)

    def _make_room(self, now: tuple, options: tuple) -> _Candidates:
        """Candidates that are still to be found, in memory that stays where it is."""
        positions, cell, *_ = now
        cutoff, skin, full, capacity, *_ = options
        device = positions.device
        num_rows = _ops.num_rows(positions.shape[0], _validate.num_systems(cell))
        if device not in self._tallies:
            self._tallies[device] = torch.zeros(2, dtype=torch.int64, device=device)
        room = math.ceil(capacity * candidates_a_pair(cutoff, skin)) * (1 if full else 2)
        links, rows = (torch.zeros(n, dtype=torch.int64, device=device) for n in (max(room, 1), num_rows))
        num_candidates = torch.full((), -1, dtype=torch.int64, device=device)
        blank = tuple(None if t is None else _own(torch.zeros_like(t)) for t in now)
        found = links, rows, num_candidates, self._tallies[device]
        return _Candidates(blank, options, found, _stream(device))


def candidates_a_pair(cutoff: float, skin: float) -> float:
    """For how many candidates a pair a capacity leaves room on a GPU: as many as there are at one density."""
    return (1.0 + skin / cutoff) ** 3


def _own(tensor: Tensor | None) -> Tensor | None:
    """Positions and cells may be changed in place before the next call."""
    return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)


def _margins(kept: _Candidates, now: tuple) -> Tensor | None:
    """(B,) not negative where the candidates hold all pairs of a system; None if they are of other atoms."""
    positions, cell, pbc, system_idx = now
    old_positions, old_cell, old_pbc, old_system_idx = kept.inputs
    cutoff, skin, _ = kept.options
    if (
        old_positions.shape != positions.shape
        or old_positions.dtype != positions.dtype
        or old_cell.shape != cell.shape
        or not torch.equal(old_pbc, pbc)
        or (old_system_idx is None) != (system_idx is None)
        or (system_idx is not None and not torch.equal(old_system_idx, system_idx))
    ):
        return None
    return _ops.candidates_margins(old_positions, old_cell, *now, cutoff, cutoff + skin)


def _search_on_cpu(
    now: tuple, options: tuple, kept: _Candidates | None, margins: Tensor | None
) -> _Candidates:
    """Candidates of all systems, some of which may keep their old ones.

    Those with half of their margin keep them. The others would have their turn soon, and each turn has its
    price: so systems that are alike are searched together, and one that is hotter alone (benchmarks/skin.py).
    """
    holds = None if margins is None else margins >= 0.5 * options[1]
    if holds is not None and holds.any():
        try:
            return _search_others(now, kept, holds)
        except ValueError:
            pass  # bad input, which the search of all names by its number
    return _Candidates(tuple(map(_own, now)), options, _compact(now, options))


def _search_others(now: tuple, kept: _Candidates, holds: Tensor) -> _Candidates:
    positions, cell, pbc, system_idx = now
    systems = (~holds).nonzero()[:, 0]
    number = torch.zeros_like(holds, dtype=torch.int64)
    number[systems] = torch.arange(len(systems))
    atoms = (~holds)[system_idx].nonzero()[:, 0]
    part = positions[atoms], cell[systems], pbc if pbc.ndim == 1 else pbc[systems], number[system_idx[atoms]]
    found = _ops.merge_candidates(kept.found, _compact(part, kept.options), atoms, systems, len(holds))
    old_positions, old_cell, *rest = kept.inputs
    inputs = old_positions.index_copy(0, atoms, part[0]), old_cell.index_copy(0, systems, part[1]), *rest
    return _Candidates(inputs, kept.options, found)


def _compact(now: tuple, options: tuple) -> tuple[Tensor, ...]:
    positions, cell, _, system_idx = now
    cutoff, skin, full = options
    mapping, shifts, _ = _ops.neighbor_pairs(*now, cutoff + skin, full, True)
    num_systems = _validate.num_systems(cell)
    return _ops.compact_candidates(mapping, shifts, system_idx, positions.shape[0], num_systems)


def _shapes(now: tuple) -> tuple:
    """What can be compared without waiting for a GPU: the device compares the rest."""
    positions, cell, pbc, system_idx = now
    return positions.shape, cell.shape, pbc.shape, system_idx is None, positions.dtype, positions.device


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
