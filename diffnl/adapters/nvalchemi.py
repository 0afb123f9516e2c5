"""nvalchemi-toolkit-ops: its `neighbor_list`, as a matrix and in COO form, on any device."""

import math
import re
import reprlib

import torch
from torch import Tensor

from ..neighbors import neighbor_pairs
from . import _common

_METHODS = "(batch_)?(naive(_scalar|_tile|_dual_cutoff)?|cell_list(_(atom|pair)_centric)?|cluster_tile)"
_OPTIONS = "max_neighbors[12]?|return_(distances|vectors)|neighbor_matrix(_shifts)?|num_neighbors"
# Space for its searches and hints to them, without effect here.
_OPTIONS += "|[a-z_]+_per_(system|dimension|group)|[a-z_]+_buffer|neighbor_search_radius|strategy"
_OPTIONS += "|cell_(offsets|atom_[a-z_]+)|atom(s_per|_to|_periodic|_centric)_[a-z_]+|sorted_[a-z]+"
_COLUMNS = "distances", "vectors"


def neighbor_list(
    positions: Tensor, cutoff: float | None = None, cell: Tensor | None = None, pbc: Tensor | None = None,
    batch_idx: Tensor | None = None, batch_ptr: Tensor | None = None, cutoff2: float | None = None,
    half_fill: bool = False, fill_value: int | None = None, return_neighbor_list: bool = False,
    method: str | None = None, wrap_positions: bool = True, *, grid_policy: str = "configured", state=None,
    **kwargs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`nvalchemiops.torch.neighbors.neighbor_list` of 0.5, with one search for all systems and cutoffs.

    Args:
        positions: (N, 3) float32 or float64, any length unit.
        cutoff, cutoff2: > 0; |v| < cutoff. A second one adds the tensors of a second list.
        cell, pbc: (3, 3) or (B, 3, 3) in the dtype of `positions`, (3,) or (B, 3) bool; both or neither. One
            holds for all systems, where its own methods read beyond it.
        batch_idx, batch_ptr: integers, the system of each atom (N,); or where systems begin and end (B + 1,),
            from 0 to N, which is checked on the CPU.
        half_fill: a pair once, i < j, or i = j with a lexicographically positive shift. Its methods disagree.
        return_neighbor_list, fill_value: COO form, not a matrix, with this in empty places (None: N).
        method, wrap_positions, grid_policy: without effect.
        kwargs: `max_neighbors`, K (None: its guess, for 0.2 atoms a unit of volume), or `max_neighbors1` and
            `max_neighbors2`; `return_distances`, `return_vectors`; the three matrices to write to.

    Returns:
        A cutoff: `neighbor_matrix` (N, K), `num_neighbors` (N,), and with `pbc` (or "cell_list" methods)
        `neighbor_matrix_shifts` (N, K, 3); or `neighbor_list` (2, P), `neighbor_ptr` (N + 1,),
        `neighbor_list_shifts` (P, 3). int32. Then, in this form too, the wanted distances and vectors
        v = r_j - r_i + S @ cell, 0 in empty places, differentiable to every order, for one cutoff only.
        The matrix is cut off at K, which a warning says, and `num_neighbors` is not.

    Raises:
        NeighborOverflowError: in COO form, more neighbours than a given `max_neighbors`.
        ValueError, TypeError: bad arguments, also a `cell` of another dtype, which its own methods misread;
            arguments for states, partial lists and rebuilds, and pair functions.
    """
    given = {n: x for n, x in {"state": state, **kwargs}.items() if x is not None and x is not False}
    for name in given:
        if not re.fullmatch(_OPTIONS, name) or (cutoff2 is not None and re.match("return|neigh|num_n", name)):
            raise TypeError(f"neighbor_list() has no `{name}`" + " for two cutoffs" * (cutoff2 is not None))
    if cutoff is None or (cell is None) != (pbc is None):
        raise ValueError("`cutoff` must be given, and `cell` and `pbc` both or neither")
    if not re.fullmatch(_METHODS, method or "naive") or grid_policy not in ("configured", "adaptive"):
        raise ValueError(f"Invalid method: {method}, or grid_policy: {grid_policy}")

    half_fill = _common.flag("half_fill", half_fill)
    return_neighbor_list = _common.flag("return_neighbor_list", return_neighbor_list)
    extra = ["shifts"] * (pbc is not None or "cell_list" in (method or ""))
    wanted = {name: _common.flag(f"return_{name}", given.get(f"return_{name}", False)) for name in _COLUMNS}
    extra += [name for name in _COLUMNS if wanted[name]]
    cell, pbc, system_idx = _systems(positions, cell, pbc, batch_idx, batch_ptr)
    rows, cutoffs = len(positions), [_common.length("cutoff", cutoff)]
    cutoffs += [] if cutoff2 is None else [_common.length("cutoff2", cutoff2)]
    limit = given["neighbor_matrix"].shape[1] if "neighbor_matrix" in given else None
    limit = given.get("max_neighbors", given.get("max_neighbors1", limit))
    limits = [limit, given.get("max_neighbors2", limit)]
    limits = [one if one is None else _common.count("max_neighbors", one) for one in limits]
    guess = 16 * math.ceil(max(16.0, 0.8 / 3.0 * math.pi * max(cutoffs) ** 3) / 16)

    results: list[Tensor] = []
    with torch.set_grad_enabled(torch.is_grad_enabled() and extra not in ([], ["shifts"])):
        lists = neighbor_pairs(positions, cell, pbc, cutoffs, system_idx, full=not half_fill)
    for pairs, limit in zip(lists, limits, strict=False):
        i, j = pairs.mapping
        starts = torch.searchsorted(i.contiguous(), torch.arange(rows + 1, device=i.device), out_int32=True)
        columns = [getattr(pairs, name) for name in extra]
        if return_neighbor_list:  # no look at the device where there are fewer pairs in all
            if limit is not None and len(j) > limit < (most := int(starts.diff().max())):
                raise _overflow(limit, most)
            results += [pairs.mapping.to(torch.int32), starts, *columns]
            continue
        width, slot = guess if limit is None else limit, torch.arange(len(j), device=i.device) - starts[i]
        if len(j) > width:
            kept = int(starts.diff().clamp(max=width).sum())
            _common.warn_of_dropped("max_neighbors", width, kept, len(j), stacklevel=2)
        # What is cut off goes to one more place, behind the matrix.
        place = torch.where(slot < width, i * width + slot, rows * width)
        fill = rows if fill_value is None else fill_value
        matrix = [_spread(j.to(torch.int32), place, (rows, width), fill), starts.diff()]
        matrix += [_spread(values, place, (rows, width), 0) for values in columns]
        for column, name in enumerate(("neighbor_matrix", "num_neighbors", "neighbor_matrix_shifts")):
            if name in given:
                matrix[column] = given[name].copy_(matrix[column])
        results += matrix
    return tuple(results)


def _spread(values: Tensor, place: Tensor, shape: tuple[int, int], fill: int) -> Tensor:
    flat = values.new_full((math.prod(shape) + 1, *values.shape[1:]), fill)
    return flat.index_put_((place,), values)[:-1].reshape(*shape, *values.shape[1:])


def _systems(positions, cell, pbc, batch_idx, batch_ptr):
    """Cell (B, 3, 3) and `pbc` for as many systems as there are, and the system of each atom."""
    if batch_ptr is not None:
        _check_ptr(batch_ptr, len(positions))
    if batch_ptr is not None and batch_idx is None:
        atoms = torch.arange(len(positions), device=positions.device)
        batch_idx = torch.bucketize(atoms, batch_ptr[1:].long(), right=True)
    if batch_idx is not None and cell is not None and cell.shape in ((3, 3), (1, 3, 3)):
        if batch_ptr is None:
            batch_idx, count = _common.systems(batch_idx, positions)
        else:
            count = len(batch_ptr) - 1
        cell = cell.reshape(1, 3, 3).expand(count, 3, 3)
    if cell is None:
        pbc = None
    return cell, pbc.reshape(3) if isinstance(pbc, Tensor) and pbc.numel() == 3 else pbc, batch_idx


def _check_ptr(batch_ptr, num_atoms: int) -> None:
    if _common.integers("batch_ptr", batch_ptr).ndim != 1 or len(batch_ptr) < 2:
        raise ValueError(f"`batch_ptr` must have shape (B + 1,), B > 0; got {tuple(batch_ptr.shape)}")
    if _common.may_look(batch_ptr):
        ends = batch_ptr.tolist()
        if (ends[0], ends[-1]) != (0, num_atoms) or sorted(ends) != ends:
            must = f"start at 0, ascend and end at N = {num_atoms}"
            raise ValueError(f"`batch_ptr` must {must}; got {reprlib.repr(ends)}")


def _overflow(limit: int, most: int) -> Exception:
    """The exception of the package, for those who catch it."""
    try:
        from nvalchemiops.torch.neighbors import NeighborOverflowError
    except ImportError:
        return ValueError(f"`max_neighbors` must be at least {most}; got {limit}")
    return NeighborOverflowError(limit, most)
