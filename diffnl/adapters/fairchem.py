"""fairchem's `radius_graph_pbc` and `radius_graph_pbc_v2`.

from diffnl.adapters import fairchem

fairchem.install()  # fairchem's models build their graphs with diffnl
"""

import math
import reprlib

import torch
from torch import Tensor

import diffnl

from . import _common


@torch.no_grad()
def radius_graph_pbc(
    data,
    radius: float,
    max_num_neighbors_threshold: int,
    enforce_max_neighbors_strictly: bool = False,
    pbc: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of a batch, with fairchem's rows: row 0 is the neighbour j, row 1 the centre i.

    An edge has |r_j - r_i + S @ h| <= radius, and a square above 1e-4, as there. Centres ascend, and for each
    the neighbours and S. Atoms may lie outside the cell, where fairchem's own lists miss edges; systems may
    differ in `data.pbc`, for which fairchem's raises. All runs on the device of `data.pos`. Neighbours beyond
    the limit are dropped, as there, and a warning says so.

    Args:
        data: `AtomicData`, or what has pos (N, 3), cell (B, 3, 3), natoms (B,), pbc (B, 3) or (3,). A `batch`
            (N,) is used if there is one; otherwise atoms are in order of their systems, whose numbers natoms
            add up to N.
        radius: > 0, in the length unit of the positions.
        max_num_neighbors_threshold: n, the nearest that an atom keeps; <= 0 for all. Unless strict, also all
            whose squared distance is at most 0.01 above that of number n + 1: it leaves shells whole.
        enforce_max_neighbors_strictly: keep n. Of equally far ones those with the lowest (j, S).
        pbc: (3,) or (B, 3) bool instead of `data.pbc`: an axis is periodic in all systems if it is in one.

    Returns:
        edge_index (2, E) int64; cell_offsets (E, 3), S in the dtype of the cell; neighbors (B,) int64, the
        number of edges of each system.

    Raises:
        AssertionError: `data` without pbc. ValueError, TypeError: as `diffnl.neighbor_pairs`; a limit that is
            not an integer.
    """
    assert hasattr(data, "pbc"), "AtomicData does not have pbc set"
    pbc = data.pbc if pbc is None else pbc.reshape(-1, 3).any(0)
    return _graph(data, radius, max_num_neighbors_threshold, enforce_max_neighbors_strictly, pbc, least=1e-4)


@torch.no_grad()
def radius_graph_pbc_v2(
    data,
    radius: float,
    max_num_neighbors_threshold: int,
    enforce_max_neighbors_strictly: bool = False,
    pbc: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `radius_graph_pbc`, but only `data.pbc` counts, and only coincident atoms are no edge.

    With a `data.node_partition`, the numbers of some atoms, only edges to those are listed.
    """
    assert hasattr(data, "pbc"), "AtomicData does not have pbc set"
    targets = getattr(data, "node_partition", None)
    most, strictly = max_num_neighbors_threshold, enforce_max_neighbors_strictly
    return _graph(data, radius, most, strictly, data.pbc, targets=targets)


def install() -> None:
    """Lets fairchem's `generate_graph`, and so its models, use these as `radius_pbc_version` 1 and 2."""
    from fairchem.core.graph import compute

    compute.radius_graph_pbc, compute.radius_graph_pbc_v2 = radius_graph_pbc, radius_graph_pbc_v2


def _graph(data, radius, most: int, strictly: bool, pbc: Tensor, least: float = 0.0, targets=None):
    """Edges of a squared length above `least`: above 0 are those of any length that is not 0."""
    most = _common.count("max_num_neighbors_threshold", most, least=None)
    strictly = _common.flag("enforce_max_neighbors_strictly", strictly)
    positions, cell, system_idx = data.pos, data.cell.reshape(-1, 3, 3), getattr(data, "batch", None)
    num_atoms, num_systems = positions.shape[0], cell.shape[0]
    if system_idx is None:
        system_idx = torch.arange(num_systems, device=positions.device)
        natoms = _atoms_of_systems(data.natoms, num_systems, positions)
        system_idx = system_idx.repeat_interleave(natoms, output_size=num_atoms)
    pbc = torch.atleast_2d(pbc).to(positions.device).expand(num_systems, 3)
    cutoff = _just_above(radius, positions.dtype)
    mapping, shifts, vectors = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, sorted=True)
    squared = vectors.square().sum(1)
    keep = squared > least if least > 0 else (vectors != 0).any(1)
    if targets is not None:
        targets = _node_partition(targets, num_atoms)
        keep &= torch.zeros_like(system_idx, dtype=torch.bool).index_fill(0, targets, True)[mapping[0]]
    mapping, shifts, squared = mapping[:, keep], shifts[keep], squared[keep]
    rank = torch.arange(len(squared), device=squared.device) - torch.searchsorted(mapping[0], mapping[0])
    if most > 0 and bool((rank >= most).any()):
        nearest = _nearest(mapping[0], rank, squared, num_atoms, most, strictly)
        found, mapping, shifts = len(shifts), mapping[:, nearest], shifts[nearest]
        dropped = "max_num_neighbors_threshold", most, len(shifts), found
        _common.warn_of_dropped(*dropped, stacklevel=4)  # of whom calls either function, past its no_grad
    neighbors = torch.zeros(num_systems, dtype=torch.int64, device=positions.device)
    neighbors.index_add_(0, system_idx[mapping[0]], torch.ones_like(mapping[0]))
    return mapping.flip(0), shifts.to(cell.dtype), neighbors


def _atoms_of_systems(natoms, num_systems: int, positions: Tensor) -> Tensor:
    """`data.natoms`, (B,) int64; one system's may be without an axis. Values are checked on the CPU."""
    if not isinstance(natoms, Tensor):
        natoms = torch.tensor(natoms, device=positions.device)
    natoms = _common.integers("natoms", natoms).reshape(-1).long()
    if len(natoms) != num_systems:
        raise ValueError(f"`natoms` must have shape (B,) = ({num_systems},); got ({len(natoms)},)")
    if _common.may_look(natoms):
        numbers = natoms.tolist()
        if min(numbers, default=0) < 0 or sum(numbers) != len(positions):
            must = f"be >= 0 and add up to N = {len(positions)}"
            raise ValueError(f"`natoms` must {must}; got {reprlib.repr(numbers)}")
    return natoms


def _node_partition(atoms, num_atoms: int) -> Tensor:
    """`data.node_partition`, as int64. Values are checked on the CPU."""
    atoms = _common.integers("node_partition", atoms).long()
    if _common.may_look(atoms) and bool((outside := (atoms < 0) | (atoms >= num_atoms)).any()):
        got = atoms[outside][0].item()
        raise ValueError(f"`node_partition` must hold numbers of atoms in [0, {num_atoms}); got {got}")
    return atoms


def _nearest(centers, rank, squared: Tensor, num_atoms: int, most: int, strictly: bool) -> Tensor:
    """(E,) bool: which edges are kept. Centres ascend; ranks are places in the row of a centre."""
    order = torch.argsort(squared, stable=True)
    order = order[torch.argsort(centers[order], stable=True)]  # each row by distance
    if strictly:
        return torch.empty_like(order, dtype=torch.bool).index_put((order,), rank < most)
    farthest, beyond = squared.new_full((num_atoms,), math.inf), order[rank == most]
    farthest[centers[beyond]] = squared[beyond] + 0.01
    return squared <= farthest[centers]


def _just_above(radius: float, dtype: torch.dtype) -> float:
    """The cutoff with which "<" is "<=" with the radius, in that dtype."""
    radius = _common.length("radius", radius)
    limit = torch.tensor(radius * radius, dtype=dtype, device="cpu")
    limit = torch.nextafter(limit, torch.full_like(limit, math.inf)).item()
    cutoff = math.sqrt(limit)
    while cutoff * cutoff < limit:  # in float64 the root may have been rounded down
        cutoff = math.nextafter(cutoff, math.inf)
    return cutoff
