"""A list that is searched again only when a pair could have been missed.

Candidates to cutoff + skin are kept from one search. While they are known to hold every pair (the criterion
and its proof: csrc/drift.h), a call selects from them by the exact test, with the positions and cell of that
call: the same pairs and bits as a fresh sorted list, and gradients of what the call was given. Atoms that
have jumped by lattice vectors, as wrapping makes them, have not moved: the shifts of their candidates follow.

On the CPU the host asks whether they hold. On a GPU the device does, and the answer comes with the number of
pairs; with a capacity nobody on the host learns it, and the device searches by itself.

What is kept belongs to the options and shapes of a call, so that training and validation may take turns; on a
GPU also to a stream and a thread. A call in a graph owns the memory that its replays write.
"""

import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops, _validate
from ._torch_compat import current_stream
from .autograd import Found, Selection, nobody_differentiates, transforms_active, wants_links

# Of how many options and shapes a layer keeps candidates: those that were used last.
MOST_KEPT = 4


@dataclass(frozen=True)
class _Candidates:
    """A search and what it was for."""

    key: tuple  # what the host can compare: options and shapes, then the stream
    inputs: tuple  # positions, cell, pbc, system_idx
    found: tuple[Tensor, ...]


def _look_up(kept: tuple[_Candidates, ...], key: tuple) -> _Candidates | None:
    return next((candidates for candidates in kept if candidates.key == key), None)


def _put_first(kept: tuple[_Candidates, ...], latest: _Candidates) -> tuple[_Candidates, ...]:
    if kept and kept[0] is latest:
        return kept
    return latest, *[other for other in kept if other.key != latest.key][: MOST_KEPT - 1]


class _OfThread(threading.local):
    """What is kept on GPUs, the latest first: candidates, and memory for those of padded lists."""

    candidates: tuple[_Candidates, ...] = ()
    padded: tuple[_Candidates, ...] = ()
    unlinked = 0

    def waits_for_links(self) -> bool:
        """Pairs that could not be linked get a fresh list; but atoms may be wrapped some time."""
        self.unlinked += 1
        return self.unlinked % 32 != 0


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
        self.reset()

    def reset(self) -> None:
        """Forgets all candidates, also those that captured graphs write: these must not be replayed again."""
        for device in {candidates.found[0].device for candidates in getattr(self, "_captured", ())}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a replay may be under way, on any stream
        self._on_cpu: tuple[_Candidates, ...] = ()
        self._of_thread = _OfThread()
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
            _validate.is_traced() or transforms_active() or positions.shape[0] == 0 or positions.is_meta
        ):
            return None
        if positions.device.type not in _ops.LINKED_DEVICES:
            return self._find_on_cpu(where, cutoffs, skin, full, capacity)
        now = positions.detach(), cell.detach(), pbc, system_idx
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

    def _find_on_cpu(self, where: tuple, cutoffs, skin, full, capacity):
        key = max(cutoffs), skin, full, *_shapes(where)
        kept = _look_up(self._on_cpu, key)
        margins, jumps, reused = (None, None, False) if kept is None else _moves(kept, where)
        self._counts[reused] += 1
        if not reused:
            positions, cell, *rest = where
            now = positions.detach(), cell.detach(), *rest
            kept, jumps = _search_on_cpu(now, key, kept, margins, jumps)
        self._on_cpu = _put_first(self._on_cpu, kept)
        select = Selection.forward if nobody_differentiates(*where[:2]) else Selection.call
        return [select(*where, kept.found, jumps, cutoff, capacity) for cutoff in cutoffs]

    def _find_on_gpu(self, now: tuple, cutoffs, skin, full, linked):
        radius = max(cutoffs) + skin
        key = radius, full, *_shapes(now), _stream(now[0].device)
        kept = _look_up(self._of_thread.candidates, key)
        lists = None
        if kept is not None:
            if kept.found:
                lists = self._select(now, kept, cutoffs, radius, full, linked, ask=True)
            elif self._of_thread.waits_for_links():
                return None
        self._counts[lists is not None] += 1
        if lists is None:
            links, rows = _ops.search_candidates(*now, radius)
            compact = (links, rows) if rows.shape[0] > 0 else ()
            kept = _Candidates(key, tuple(map(_own, now)), compact)
            if compact:
                lists = self._select(now, kept, cutoffs, radius, full, linked, ask=False)
        self._of_thread.candidates = _put_first(self._of_thread.candidates, kept)
        return lists

    @staticmethod
    def _select(now, kept: _Candidates, cutoffs, radius, full, linked, ask: bool):
        """A list for each cutoff; None if it turns out that the candidates do not hold all pairs."""
        lists: dict = {}
        for cutoff in sorted(set(cutoffs), reverse=True):
            count, jumped, *found = _ops.select_linked(
                now, (*kept.inputs, *kept.found), cutoff, radius, full, linked, ask
            )
            # Candidates that hold the pairs of the longest hold the others. Jumps must be found again.
            ask = jumped
            if count < 0:
                return None
            mapping, shifts, vectors, links, rows = found
            lists[cutoff] = mapping, shifts, vectors, None, links, rows
        return [lists[cutoff] for cutoff in cutoffs]

    def _find_padded_on_gpu(self, now: tuple, cutoff, skin, full, linked, capacity):
        device = now[0].device
        options = cutoff, skin, full, capacity, *_shapes(now)
        if _validate.is_capturing(device):
            kept = self._give_to_graph(now, options)
        else:
            key = *options, _stream(device)
            kept = _look_up(self._of_thread.padded, key) or self._make_room(now, key)
            self._of_thread.padded = _put_first(self._of_thread.padded, kept)
        arguments = (*kept.inputs, *kept.found)
        return _ops.padded_select_linked(now, arguments, cutoff, cutoff + skin, capacity, full, linked)

    def _give_to_graph(self, now: tuple, options: tuple) -> _Candidates:
        """Memory that one call of one graph writes, for as long as the graph is replayed."""
        # Whoever captures has waited for what other streams have done.
        kept = next((room for room in self._of_thread.padded if room.key[:-1] == options), None)
        if kept is None:
            with _outside_of_capture(now[0]):
                kept = self._make_room(now, options)
        self._of_thread.padded = tuple(room for room in self._of_thread.padded if room is not kept)
        self._captured.append(kept)
        return kept

    def _make_room(self, now: tuple, key: tuple) -> _Candidates:
        """Candidates that are still to be found, in memory that stays where it is."""
        positions, cell, *_ = now
        cutoff, skin, full, capacity, *_ = key
        device = positions.device
        num_rows = _ops.num_rows(positions.shape[0], _validate.num_systems(cell))
        if device not in self._tallies:
            self._tallies.setdefault(device, torch.zeros(2, dtype=torch.int64, device=device))
        room = math.ceil(capacity * candidates_a_pair(cutoff, skin)) * (1 if full else 2)
        links, rows = (torch.zeros(n, dtype=torch.int64, device=device) for n in (max(room, 1), num_rows))
        num_candidates = torch.full((), -1, dtype=torch.int64, device=device)
        blank = tuple(None if t is None else _own(torch.zeros_like(t)) for t in now)
        return _Candidates(key, blank, (links, rows, num_candidates, self._tallies[device]))


@contextmanager
def _outside_of_capture(like: Tensor):
    """For what a graph that is being captured must find done, but not do at each replay."""
    device = like.device
    mode = _ops.exchange_capture_mode(like, _ops.RELAXED_CAPTURE)
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            while _validate.is_capturing(device):  # torch has few streams, and hands them out in turn
                stream = torch.cuda.Stream(device)
                torch.cuda.set_stream(stream)
            yield
            stream.synchronize()
    finally:
        _ops.exchange_capture_mode(like, mode)


def candidates_a_pair(cutoff: float, skin: float) -> float:
    """For how many candidates a pair a capacity leaves room on a GPU: as many as there are at one density."""
    return (1.0 + skin / cutoff) ** 3


def _own(tensor: Tensor | None) -> Tensor | None:
    """Positions and cells may be changed in place before the next call."""
    return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)


def _moves(kept: _Candidates, now: tuple) -> tuple[Tensor | None, Tensor | None, bool]:
    """Margins (B,), not negative where the candidates hold all pairs of a system, jumps (N,), if there are
    any, and whether the candidates hold all pairs; no margins if they are of other atoms."""
    pbc, system_idx = now[2:]
    old_positions, old_cell, old_pbc, old_system_idx = kept.inputs
    if not torch.equal(old_pbc, pbc) or (
        system_idx is not None and not torch.equal(old_system_idx, system_idx)
    ):
        return None, None, False
    cutoff, skin, *_ = kept.key
    margins, jumps, hold = _ops.candidates_margins(
        old_positions, old_cell, kept.found, *now, cutoff, cutoff + skin
    )
    return margins, jumps if jumps.shape[0] > 0 else None, hold


def _search_on_cpu(
    now: tuple, key: tuple, kept: _Candidates | None, margins: Tensor | None, jumps: Tensor | None
) -> tuple[_Candidates, Tensor | None]:
    """Candidates of all systems, some of which may keep their old ones, and the jumps since.

    Those with half of their margin keep them. The others would have their turn soon, and each turn has its
    price: so systems that are alike are searched together, and one that is hotter alone (benchmarks/skin.py).
    """
    if margins is not None and margins.shape[0] > 1:  # a single system is the one to search
        holds = margins >= 0.5 * key[1]
        if holds.any():
            try:
                return _search_others(now, kept, holds, jumps)
            except ValueError:
                pass  # bad input, which the search of all names by its number
    return _Candidates(key, tuple(map(_own, now)), _compact(now, key)), None


def _search_others(
    now: tuple, kept: _Candidates, holds: Tensor, jumps: Tensor | None
) -> tuple[_Candidates, Tensor | None]:
    positions, cell, pbc, system_idx = now
    systems = (~holds).nonzero()[:, 0]
    number = torch.zeros_like(holds, dtype=torch.int64)
    number[systems] = torch.arange(len(systems), device=systems.device)
    atoms = (~holds)[system_idx].nonzero()[:, 0]
    part = positions[atoms], cell[systems], pbc if pbc.ndim == 1 else pbc[systems], number[system_idx[atoms]]
    found = _ops.merge_candidates(kept.found, _compact(part, kept.key), atoms, systems, len(holds))
    old_positions, old_cell, *rest = kept.inputs
    inputs = old_positions.index_copy(0, atoms, part[0]), old_cell.index_copy(0, systems, part[1]), *rest
    return _Candidates(kept.key, inputs, found), None if jumps is None else jumps.index_fill(0, atoms, 0)


def _compact(now: tuple, key: tuple) -> tuple[Tensor, ...]:
    positions, cell, _, system_idx = now
    cutoff, skin, full, *_ = key
    mapping, shifts, _ = _ops.neighbor_pairs(*now, cutoff + skin, full, True)
    num_systems = _validate.num_systems(cell)
    return _ops.compact_candidates(mapping, shifts, system_idx, positions.shape[0], num_systems)


def _shapes(now: tuple) -> tuple:
    """What can be compared without waiting for a GPU: the device compares the rest."""
    positions, cell, pbc, system_idx = now
    return positions.shape, cell.shape, pbc.shape, system_idx is None, positions.dtype, positions.device


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else current_stream(device.index)
