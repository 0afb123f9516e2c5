"""The neighbour list as a layer: options in, pairs out."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from . import _ops, _options, _pbc, _validate
from .autograd import (
    Found,
    LinkedPaddedSearch,
    LinkedSearch,
    PaddedSearch,
    PairVectors,
    Search,
    nobody_differentiates,
    transforms_active,
    wants_links,
)
from .pairs import PaddedPairs, Pairs
from .skin import Skin, candidates_a_pair


def neighbor_pairs(
    positions: Tensor,
    cell: Tensor | None,
    pbc: bool | Sequence[bool] | Tensor | None,
    cutoff: float | Sequence[float],
    system_idx: Tensor | None = None,
    *,
    full: bool = True,
    sorted: bool = False,
    capacity: int | None = None,
    **unknown: object,
) -> Pairs | PaddedPairs | tuple[Pairs, ...]:
    """All pairs of atoms, through all periodic images, closer than a cutoff.

    A pair (i, j, S) has the vector v = (r_j - r_i) + S @ h and is listed iff i and j belong to the same
    system, it is not an atom with itself (i = j and S = 0), and v is shorter than the cutoff, strictly.
    S_k = 0 on open axes. v and the test are computed in the dtype of `positions`, without fused multiply-add:
    t_c = ((S0*h0c + S1*h1c) + S2*h2c), v_c = (r_jc - r_ic) + t_c, d2 = (vx*vx + vy*vy) + vz*vz, listed iff
    d2 < cutoff*cutoff, a product rounded once to that dtype.

    Args:
        positions: (N, 3) float32 or float64, any length unit. Atoms may lie outside the cell.
        cell: (3, 3), or (B, 3, 3) for B systems; same dtype. Rows are lattice vectors, of any shape and
            handedness. None: no periodicity.
        pbc: which axes are periodic: a bool, three bools or integers 0 and 1, or a tensor of these, (3,) or
            (B, 3); integers in a tensor are looked at, which waits for a GPU. None without a cell only.
        cutoff: > 0, in the unit of `positions`; may be many times the cell. Several in a sequence: one
            search makes a list for each.
        system_idx: (N,) integer, the system of each atom, in any order; systems may be empty. None: one.
        full: list both (i, j, S) and (j, i, -S). Otherwise one of the two: the one with i < j, or for i = j
            the one whose S is lexicographically positive.
        sorted: order each row by (j, S). Rows are always in ascending order of i.
        capacity: return `PaddedPairs` with room for so many pairs, >= 0, without waiting for the device. What
            only the data can tell is then not raised here, but makes all vectors NaN, and `ok` for the energy
            to be multiplied with: see `PaddedPairs`.
            `estimate_capacity` helps to choose.

    Options are Python numbers and bools, NumPy scalars or 0-dimensional tensors.

    Returns:
        The pairs. The same input on the same device gives the same bits. For several cutoffs a tuple of
        `Pairs` in their order, each differentiable by itself.

    Raises:
        ValueError: wrong shapes, devices or values; NaN or infinity; a singular cell on a periodic axis; a
            cell without `pbc`; a cutoff that requires a gradient, in which a list is not differentiable.
        TypeError: wrong types or dtypes.
    """
    if unknown:
        _options.unexpected(unknown, "neighbor_pairs")
    return _find(
        positions,
        cell,
        pbc,
        system_idx,
        _options.cutoffs(cutoff),
        _options.flag("full", full),
        _options.flag("sorted", sorted),
        _options.capacity(capacity),
    )


class NeighborList(nn.Module):
    """A neighbour list as a layer, without parameters or buffers.

    Args:
        cutoff: > 0, in the length unit of the positions; or several in a sequence, for a list of each.
        full: list both (i, j, S) and (j, i, -S), or one of the two.
        sorted: order each row by (j, S).
        capacity: return `PaddedPairs` with room for so many pairs, without waiting for the device: for CUDA
            and HIP graphs, and wherever shapes must not depend on data. None: `Pairs`.
        skin: >= 0, in the length unit of the positions. Above 0 the layer keeps the pairs within cutoff +
            skin, and searches again only when a pair could have been missed, not when atoms are wrapped into
            the cell; rows are then sorted. What it returns is a fresh sorted list at every call, bit for bit,
            and so are its gradients, on a GPU up to the order in which those of the cell are summed. It keeps
            candidates of the last four shapes (on a GPU: of each thread). With a capacity on a GPU the device
            decides, in CUDA and HIP graphs too, which the layer must outlive; the capacity must leave room
            for what is kept, see `estimate_capacity`. In compiled graphs, under `torch.func` and while
            something traces operators it searches every time. Copies and pickles keep nothing.

    Attributes:
        searches, reuses: how many calls with a skin searched, and how many selected from what was kept. With
            a capacity on a GPU they wait for the device.

    Raises:
        ValueError, TypeError: a cutoff that is not a finite number > 0, a capacity not an integer >= 0, a
            skin not a finite number >= 0; `full` or `sorted` not a bool; a capacity for several cutoffs. Also
            when one of them is assigned later.
    """

    _CHECKS: ClassVar[dict[str, Callable]] = {
        "cutoff": _options.cutoffs,
        "full": partial(_options.flag, "full"),
        "sorted": partial(_options.flag, "sorted"),
        "capacity": _options.capacity,
        "skin": _options.skin,
    }

    def __init__(
        self,
        cutoff: float | Sequence[float],
        *,
        full: bool = True,
        sorted: bool = False,
        capacity: int | None = None,
        skin: float = 0.0,
        **unknown: object,
    ):
        super().__init__()
        if unknown:
            _options.unexpected(unknown, "NeighborList")
        self.cutoff = cutoff
        self.full = full
        self.sorted = sorted
        self.capacity = capacity
        self.skin = skin
        self._kept = Skin()

    def __setattr__(self, name: str, value: object) -> None:
        """Options are checked whenever they are set, so that no call has to."""
        if name in self._CHECKS:
            value = self._CHECKS[name](value)
            options = {"cutoff": 0.0, "capacity": None} | self.__dict__ | {name: value}
            _options.one_list(options["cutoff"], options["capacity"])
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        raise _validate.not_scriptable()

    def reset(self) -> None:
        """Forgets what a skin has kept, and frees it. Graphs that were captured with this layer write to that
        memory: they must not be replayed again."""
        self._kept.reset()

    @property
    def searches(self) -> int:
        return self._kept.searches

    @property
    def reuses(self) -> int:
        return self._kept.reuses

    def forward(
        self,
        positions: Tensor,
        cell: Tensor | None = None,
        pbc: bool | Sequence[bool] | Tensor | None = None,
        system_idx: Tensor | None = None,
        **unknown: object,
    ) -> Pairs | PaddedPairs | tuple[Pairs, ...]:
        """The pairs of one system or a batch; see `neighbor_pairs` for shapes, dtypes and errors.

        Without a `cell`, for open boundaries, `pbc` may be left out.
        """
        if unknown:
            _options.unexpected(unknown, "NeighborList")
        options = self.cutoff, self.full, self.sorted, self.capacity
        return _find(positions, cell, pbc, system_idx, *options, self.skin, self._kept)

    def extra_repr(self) -> str:
        shown = {"cutoff": self.cutoff, "full": self.full, "sorted": self.sorted}
        if self.capacity is not None:
            shown["capacity"] = self.capacity
        if self.skin > 0:
            shown["skin"] = self.skin
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def estimate_capacity(
    positions: Tensor,
    cell: Tensor | None,
    pbc: bool | Sequence[bool] | Tensor | None,
    cutoff: float,
    system_idx: Tensor | None = None,
    *,
    full: bool = True,
    skin: float = 0.0,
    slack: float = 0.25,
    **unknown: object,
) -> int:
    """A `capacity` for systems like this one: its number of pairs and a share to spare, in steps of 256.

    Args:
        positions, cell, pbc, cutoff, system_idx, full: as in `neighbor_pairs`, which is called.
        skin: >= 0, of the layer. On a GPU the capacity must also leave room for the pairs within cutoff +
            skin: (1 + skin / cutoff)^3 of them for each, which is enough at an even density.
        slack: >= 0, the share to spare. A quarter leaves room for a density a quarter higher, or for a
            cutoff that grows by 7 % against the cell.

    Returns:
        A number of pairs >= 256. A system may outgrow it later: `energy * pairs.ok` is NaN then, whatever the
        model makes of a list that has failed, see `PaddedPairs`.

    Raises:
        ValueError, TypeError: as `neighbor_pairs`; several cutoffs; a skin or a slack that is not a finite
            number >= 0.
    """
    if unknown:
        _options.unexpected(unknown, "estimate_capacity")
    slack, skin, cutoff = _options.slack(slack), _options.skin(skin), _options.cutoff(cutoff)

    def count(cutoff: float) -> int:
        with torch.no_grad():
            return neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=full).shifts.shape[0]

    needed = float(count(cutoff))
    if skin > 0:
        needed = max(needed, count(cutoff + skin) / candidates_a_pair(cutoff, skin))
    return max(math.ceil(needed * (1.0 + slack) / 256), 1) * 256


def _find(
    positions,
    cell,
    pbc,
    system_idx,
    cutoff,
    full: bool,
    sorted: bool,
    capacity: int | None,
    skin=0.0,
    kept=None,
):
    """The pairs for options that are checked; `skin` and what is `kept` are those of a layer."""
    _options.one_list(cutoff, capacity)
    positions = _validate.positions(positions)
    cell = None if cell is None else _validate.cell(cell, positions)
    pbc = _pbc.flags(pbc, positions, cell)
    system_idx = _validate.system_idx(system_idx, positions)
    may_wait = capacity is None
    cell, pbc, system_idx = _validate.systems(cell, pbc, system_idx, positions, may_wait=may_wait)
    where = positions, cell, pbc, system_idx
    cutoffs = cutoff if isinstance(cutoff, tuple) else (cutoff,)
    lists = _find_kept(where, cutoffs, skin, full, capacity, kept) if skin > 0 else None
    if lists is None:
        in_order = sorted or skin > 0
        if not isinstance(cutoff, tuple):
            return _find_fresh(where, cutoff, full, in_order, capacity)
        found = _find_several(where, cutoffs, full, in_order)
        lists = [found[one] for one in cutoffs]
    return tuple(lists) if isinstance(cutoff, tuple) else lists[0]


def _find_fresh(where, cutoff: float, full: bool, sorted: bool, capacity: int | None) -> Pairs | PaddedPairs:
    if capacity is not None:
        return _find_padded(where, cutoff, full, sorted, capacity)
    positions, cell, *_ = where
    if not torch.compiler.is_compiling() and nobody_differentiates(positions, cell):
        return Pairs(*_ops.neighbor_pairs(*where, cutoff, full, sorted))
    if full and not torch.compiler.is_compiling() and wants_links(positions, cell):
        found = LinkedSearch.call(*where, cutoff, sorted)
        return Pairs(*found[:3])
    return Pairs(*Search.call(*where, cutoff, full, sorted))


def _find_padded(where, cutoff: float, full: bool, sorted: bool, capacity: int) -> PaddedPairs:
    positions, cell, _, system_idx = where
    compiling = torch.compiler.is_compiling()
    if not compiling and nobody_differentiates(positions, cell):
        found = _ops.padded_neighbor_pairs(*where, cutoff, capacity, full, sorted)
    elif full and wants_links(positions, cell):
        found = LinkedPaddedSearch.call(*where, cutoff, capacity, sorted)
    else:
        found = PaddedSearch.call(*where, cutoff, capacity, full, sorted)
    pairs = PaddedPairs(*found[:4])
    return pairs if compiling else pairs._of(positions, cell, system_idx)


def _find_several(where, cutoffs: tuple[float, ...], full: bool, sorted: bool) -> dict[float, Pairs]:
    """A list for each cutoff: on the CPU from one traversal."""
    longest, *shorter = _descending(cutoffs)
    positions, cell, *_ = where
    if torch.compiler.is_compiling() or transforms_active():
        pairs = _find_fresh(where, longest, full, sorted, None)
        return {longest: pairs} | {cutoff: _closer(where, pairs, cutoff) for cutoff in shorter}
    if positions.device.type in _ops.LINKED_DEVICES:
        # A search of its own takes less time than to choose from the longest list, and its pairs have links.
        return {one: _find_fresh(where, one, full, sorted, None) for one in (longest, *shorter)}
    detached = positions.detach(), cell.detach(), *where[2:]
    lists = _ops.neighbor_lists(*detached, [longest, *shorter], full, sorted)
    return {c: _differentiable(where, found) for c, found in zip((longest, *shorter), lists, strict=True)}


def _descending(cutoffs: tuple[float, ...]) -> list[float]:
    return sorted(set(cutoffs), reverse=True)


def _closer(where, pairs: Pairs, cutoff: float) -> Pairs:
    """Those of the pairs within a shorter cutoff."""
    # One rounding an operation, as in the search.
    x, y, z = pairs.vectors.detach().square().unbind(1)
    limit = torch.tensor(cutoff * cutoff, dtype=pairs.vectors.dtype, device="cpu")
    (chosen,) = torch.nonzero((x + y) + z < limit, as_tuple=True)
    mapping, shifts = pairs.mapping[:, chosen], pairs.shifts[chosen]
    if torch.compiler.is_compiling():
        return Pairs(mapping, shifts, pairs.vectors[chosen])
    return _differentiable(where, (mapping, shifts, pairs.vectors.detach()[chosen]))


def _differentiable(where, found: tuple[Tensor, Tensor, Tensor]) -> Pairs:
    """A list found without derivatives, with its own."""
    if not nobody_differentiates(*where[:2]):
        found = Found.call(*where, (*found, None, None, None))[:3]
    return Pairs(*found)


def _find_kept(where, cutoffs: tuple[float, ...], skin, full, capacity, kept: Skin) -> list | None:
    """The sorted list of each cutoff, if a skin can be had here."""
    positions, cell, _, system_idx = where
    try:
        lists = kept.find(where, cutoffs, skin, full, capacity)
    except ValueError:
        # A list with a capacity raises nothing: the fresh search says so in its own way.
        if capacity is None:
            raise
        return None
    if lists is None or capacity is None:
        return lists and [Pairs(*found[:3]) for found in lists]
    return [PaddedPairs(*found)._of(positions, cell, system_idx) for found in lists]


def pair_vectors(
    positions: Tensor,
    cell: Tensor | None,
    mapping: Tensor,
    shifts: Tensor,
    system_idx: Tensor | None = None,
    **unknown: object,
) -> Tensor:
    """Vectors v = (r_j - r_i) + S @ h of a list that exists, in the exact arithmetic of `neighbor_pairs`.

    Args:
        positions: (N, 3) float32 or float64.
        cell: (3, 3) or (B, 3, 3), same dtype, rows are lattice vectors. None: the shifts do not matter.
        mapping: (2, P) integer, (i, j) of each pair, in any order.
        shifts: (P, 3) integer S of each pair; values in [-2**31, 2**31).
        system_idx: (N,) integer, the system of each atom; needed for more than one cell.

    Returns:
        (P, 3), dtype of `positions`; differentiable in `positions` and `cell` to every order.

    Raises:
        ValueError: wrong shapes or devices; on the CPU an atom number outside [0, N), a system outside
            [0, B), a pair of atoms of two systems or a shift that does not fit. On a GPU such a pair gets NaN
            instead: raising would mean waiting.
        TypeError: wrong types or dtypes.
    """
    if unknown:
        _options.unexpected(unknown, "pair_vectors")
    positions = _validate.positions(positions)
    cell = None if cell is None else _validate.cell(cell, positions)
    mapping = _validate.mapping(mapping, positions)
    shifts, mapping = _validate.shifts(shifts, mapping)
    system_idx = _validate.system_idx(system_idx, positions)
    if cell is None:
        shifts = system_idx = None
    else:
        _validate.atoms_have_systems(cell, system_idx, positions)
    return PairVectors.call(positions, cell, mapping, shifts, system_idx, None)
