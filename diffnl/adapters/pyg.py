"""torch_cluster's `radius_graph`, and for PyG a periodic graph transform and an interaction graph.
None of them needs torch_cluster or pyg-lib.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

import diffnl

from . import _common


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int | None = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """The edges between points closer than `r`, strictly, without periodicity.

    In the order of torch_cluster on a GPU: targets ascend, and so do the sources of each. A point with too
    many neighbours keeps those with the lowest numbers, as there, and a warning says so. torch_cluster may
    keep `max_num_neighbors` + 1: it leaves room for the point itself, found or not.

    Args:
        x: (N,) or (N, F) float32 or float64, F up to 3.
        r: > 0, in the unit of `x`.
        batch: (N,) integer, the example of each point, in any order. None: one.
        loop: list each point with itself too; it counts as a neighbour.
        max_num_neighbors: how many sources a target may have, >= 1. None: all.
        flow: "source_to_target": row 0 is the neighbour, row 1 the centre; "target_to_source": the reverse.
        num_workers, batch_size: make no difference.

    Returns:
        (2, E) int64.

    Raises:
        ValueError, TypeError: more than three dimensions, another flow; as `diffnl.neighbor_pairs`.
    """
    _check(flow)
    r, loop = _common.length("r", r), _common.flag("loop", loop)
    if max_num_neighbors is not None:
        max_num_neighbors = _common.count("max_num_neighbors", max_num_neighbors, least=1)
    if x.numel() == 0:
        return torch.empty(2, 0, dtype=torch.int64, device=x.device)
    x = x.unsqueeze(1) if x.ndim == 1 else x
    if x.ndim != 2 or x.shape[1] > 3:
        raise ValueError(f"`x` must have shape (N,) or (N, F) with F <= 3; got {tuple(x.shape)}")
    num_points, positions = x.shape[0], nn.functional.pad(x.detach(), (0, 3 - x.shape[1]))
    edges = diffnl.neighbor_pairs(positions, None, None, r, batch, sorted=True).mapping
    if loop:
        itself = torch.arange(num_points, device=x.device)
        edges = torch.cat((edges, itself.expand(2, -1)), 1)
        edges = edges[:, torch.argsort(edges[0] * num_points + edges[1])]
    if max_num_neighbors is not None and max_num_neighbors < num_points:
        place = torch.arange(edges.shape[1], device=x.device) - torch.searchsorted(edges[0], edges[0])
        kept = edges[:, place < max_num_neighbors]
        found = "max_num_neighbors", max_num_neighbors, kept.shape[1], edges.shape[1]
        _common.warn_of_dropped(*found, stacklevel=2)
        edges = kept
    return edges.flip(0) if flow == "source_to_target" else edges


class PeriodicRadiusGraph:
    """A transform like PyG's `RadiusGraph`, through all periodic images and with all neighbours.

    Of a `Data` or a `Batch` it reads pos (N, 3) and, where there are, cell (B, 3, 3), pbc (B, 3), batch (N,).
    Without a pbc all axes of a cell are periodic; one flag or three will do as well. It sets edge_attr to
    None and

        edge_index (2, E) int64: source j and target i, i ascending; j = i only for another image.
        cell_shifts (E, 3) int32: S, the number of cells between the images of target and source.
        edge_vec (E, 3): r_j - r_i + S @ h, differentiable.

    PyG batches all of that; `diffnl.pair_vectors` makes the vectors again where a model needs gradients.

    r is the cutoff, > 0 and strict, in the length unit of pos; flow as in `radius_graph`.
    """

    def __init__(self, r: float, flow: str = "source_to_target"):
        _check(flow)
        self.r, self.flow = _common.length("r", r), flow

    def __call__(self, data):
        _check(self.flow)
        data = copy.copy(data)  # as PyG's own transforms: the dataset keeps what it has
        cell, pbc = getattr(data, "cell", None), _axes(data)
        if cell is not None:
            cell = cell.reshape(-1, 3, 3)
            pbc = True if pbc is None else pbc
        pairs = diffnl.neighbor_pairs(data.pos, cell, pbc, self.r, getattr(data, "batch", None), sorted=True)
        data.edge_index = pairs.mapping.flip(0) if self.flow == "source_to_target" else pairs.mapping
        data.cell_shifts, data.edge_vec, data.edge_attr = pairs.shifts, pairs.vectors, None
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}(r={self.r})"


class InteractionGraph(nn.Module):
    """The `interaction_graph` of PyG's `SchNet`, with all neighbours and every derivative."""

    def __init__(self, cutoff: float):
        super().__init__()
        self.neighbors = diffnl.NeighborList(cutoff)

    def forward(self, pos: Tensor, batch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """edge_index (2, E), source and target, and the distances (E,), of pos (N, 3) and batch (N,)."""
        pairs = self.neighbors(pos, system_idx=batch)
        return pairs.mapping.flip(0), pairs.distances


def _axes(data):
    """The pbc of `data` as `diffnl.neighbor_pairs` takes it. PyG makes a tensor (B,) of the single flags of a
    batch, a list of their threes, and a tensor (3 B,) of tensors (3,)."""
    pbc = getattr(data, "pbc", None)
    if isinstance(pbc, list) and any(map(np.ndim, pbc)):
        return torch.tensor([_common.axes(flags) for flags in pbc], device=data.pos.device)
    if not isinstance(pbc, Tensor) or pbc.ndim == 0:
        return pbc
    ends = (getattr(data, "_slice_dict", None) or {}).get("pbc")  # of each graph, in a batch
    if pbc.ndim == 1 and ends is not None and len(ends) == len(pbc) + 1:
        return pbc[:, None].expand(-1, 3)
    if pbc.numel() == 3:  # for all systems
        return pbc.reshape(3)
    return pbc.reshape(-1, 3) if pbc.numel() % 3 == 0 else pbc


def _check(flow: str) -> None:
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f"`flow` must be 'source_to_target' or 'target_to_source'; got {flow!r}")
