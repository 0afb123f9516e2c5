"""metatomic: neighbour lists as `TensorBlock`s for its `NeighborListOptions`, differentiable."""

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .. import neighbors
from . import _common

_SAMPLES = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]


def add_neighbors(systems, requested, length_unit: str = "angstrom") -> None:
    """Stores lists in systems, those of `compute_neighbors`, with one search for all systems and each list.

    Args:
        systems: a `metatomic.torch.System`, or a list of them with one dtype and device.
        requested: a model, such as an `AtomisticModel`, that has `requested_neighbor_lists()`; or
            `NeighborListOptions`, one or a list.
        length_unit: the unit of positions and cells.

    Raises:
        ValueError: systems of several dtypes or devices; a list that a system has already.
    """
    systems = list(systems) if isinstance(systems, list | tuple) else [systems]
    if len({(system.positions.dtype, system.positions.device) for system in systems}) > 1:
        raise ValueError("`systems` must have one dtype and one device; got several")
    if hasattr(requested, "requested_neighbor_lists"):
        requested = requested.requested_neighbor_lists()
    for options in requested if isinstance(requested, list | tuple) else [requested]:
        for system, block in zip(systems, _blocks(systems, options, length_unit), strict=True):
            system.add_neighbor_list(options, block)


def compute_neighbors(system, options, length_unit: str = "angstrom"):
    """The neighbour list of a `metatomic.torch.System`, in the unit of its positions.

    Args:
        system: float32 or float64; atoms may lie outside the cell.
        options: `metatomic.torch.NeighborListOptions`. Its cutoff is converted to `length_unit`. Lists are
            strict, |v| < cutoff, which a request that is not strict allows. Half lists hold the pairs with
            first_atom < second_atom, and of an atom and its own image the lexicographically positive shift.
        length_unit: the unit of positions and cell.

    Returns:
        `metatensor.torch.TensorBlock` with int32 samples (P, 5) by ascending first_atom, values (P, 3, 1)
        v = r_second - r_first + shift @ cell. They are differentiable in positions and cell to every order:
        `register_autograd_neighbors` is not needed, and refuses what is in a graph already.
    """
    return _blocks([system], options, length_unit)[0]


class NeighborList:
    """Stands in for `vesin.metatomic.NeighborList`, which metatomic's ASE calculator looks up.

    Blocks are those of `compute_neighbors`. With a skin, in the unit of the system, a search is made when a
    pair could have been missed; blocks are the same. `check_consistency` holds each block against metatomic's
    own check, a slow loop. What is returned is never overwritten, whatever `copy` says.

    Raises:
        NotImplementedError: `torchscript=True`. Scripted models take the blocks; this class is not for them.
    """

    def __init__(self, options, length_unit, torchscript=False, check_consistency=False, skin=2.0):
        if _common.flag("torchscript", torchscript):
            raise NotImplementedError("`torchscript` must be False: this class cannot be scripted; got True")
        self.options, self.length_unit = options, length_unit
        self.check_consistency = _common.flag("check_consistency", check_consistency)
        cutoff = options.engine_cutoff(length_unit)
        self._search = neighbors.NeighborList(cutoff, full=options.full_list, skin=skin)

    def compute(self, system, copy: bool = True):
        """The `TensorBlock` of a system; see `compute_neighbors`."""
        pairs = self._search(system.positions, system.cell, system.pbc)
        if self.check_consistency:
            from metatomic.torch import register_autograd_neighbors

            # It takes only what is in no graph, and is called for its check alone.
            detached = _block(pairs.mapping, pairs.shifts, pairs.vectors.detach())
            register_autograd_neighbors(system, detached, check_consistency=True)
        return _block(*pairs)

    def add_neighbor_list(self, systems, copy: bool = True) -> None:
        """Stores the list in a system, or in each of a list of them."""
        for system in systems if isinstance(systems, list) else [systems]:
            system.add_neighbor_list(self.options, self.compute(system))


def _blocks(systems: list, options, length_unit: str) -> list:
    cutoff, full = options.engine_cutoff(length_unit), options.full_list
    if len(systems) < 2:
        found = [neighbors.neighbor_pairs(s.positions, s.cell, s.pbc, cutoff, full=full) for s in systems]
        return [_block(*pairs) for pairs in found]
    positions = torch.cat([system.positions for system in systems])
    cell, pbc = (torch.stack([getattr(system, name) for system in systems]) for name in ("cell", "pbc"))
    starts = list(accumulate([len(system) for system in systems], initial=0))[:-1]
    first = torch.tensor(starts[1:], device=positions.device)
    system_idx = torch.bucketize(torch.arange(len(positions), device=positions.device), first, right=True)
    mapping, shifts, vectors = neighbors.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=full)
    # Pairs are in ascending order of their first atom: those of a system lie together.
    ends = torch.searchsorted(mapping[0].contiguous(), first).tolist()
    split = mapping.tensor_split(ends, 1), shifts.tensor_split(ends), vectors.tensor_split(ends)
    return [_block(pair - start, *rest) for start, pair, *rest in zip(starts, *split, strict=True)]


def _block(mapping: Tensor, shifts: Tensor, vectors: Tensor):
    from metatensor.torch import Labels, TensorBlock

    samples = Labels(_SAMPLES, torch.cat([mapping.T.to(torch.int32), shifts], 1), assume_unique=True)
    return TensorBlock(vectors.unsqueeze(2), samples, *_axes(vectors.device))


@lru_cache
def _axes(device: torch.device) -> tuple[list, object]:
    """Labels of the only component and of the property, made once for a device."""
    from metatensor.torch import Labels

    return [Labels("xyz", torch.arange(3, device=device)[:, None])], Labels.range("distance", 1).to(device)
