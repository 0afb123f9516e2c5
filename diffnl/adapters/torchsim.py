"""TorchSim: functions with the signatures of its neighbour lists, for its `neighbor_list_fn` arguments.

Since TorchSim 0.5 a list takes the whole batch: `torchsim_nl`. Before, models asked for one system at a time:
`unbatched_nl`. Those models of that time that have no `neighbor_list_fn` argument (Lennard-Jones, Morse, soft
sphere, particle life) call the `vesin_nl_ts` of their own module, which can be set to `unbatched_nl`.

Its states hold cells of column vectors, but its lists are given `state.row_vector_cell`: rows are lattice
vectors, as here. Shifts have the dtype of the positions, because its models multiply them by the cell.
"""

import torch
from torch import Tensor

import diffnl

from . import _common


@torch.no_grad()
def torchsim_nl(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor | bool,
    cutoff: Tensor | float,
    system_idx: Tensor,
    self_interaction: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The full list of a batch, as `torch_sim.neighbors.torchsim_nl`, on the device of `positions`.

    Unlike its lists: systems may be interleaved, atoms may lie anywhere, and N = 0 gives an empty list. Pairs
    are strictly closer than the cutoff, tested in the dtype of `positions`; Vesin's lists test in float64.

    Args:
        positions: (N, 3) float32 or float64, any length unit.
        cell: (B, 3, 3), (3 B, 3), or (3, 3) for all systems; same dtype, rows are lattice vectors.
        pbc: bool, (B, 3), (3 B,), or (3,) for all systems; or one flag.
        cutoff: > 0, in the length unit of the positions; a number or a tensor of one.
        system_idx: (N,) integer, the system of each atom.
        self_interaction: list each atom with itself too, at zero shift, after all pairs.

    Returns:
        mapping: (2, P) int64, centre and neighbour of each pair; ascending centres.
        system_mapping: (P,) int64, the system of each pair.
        shifts_idx: (P, 3), dtype of `positions`, whole numbers S: the vector from centre to neighbour is
            positions[j] - positions[i] + S @ cell. Without gradients, which are the model's own.

    Raises:
        ValueError, TypeError: as `diffnl.neighbor_pairs`.
    """
    cell, pbc, of_atom = _by_system(positions, cell, pbc, system_idx)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, _common.length("cutoff", cutoff), of_atom)
    mapping, shifts = pairs.mapping, pairs.shifts.to(positions.dtype)
    if _common.flag("self_interaction", self_interaction):
        atoms = torch.arange(positions.shape[0], device=positions.device)
        mapping = torch.cat((mapping, atoms.expand(2, -1)), 1)
        shifts = torch.cat((shifts, torch.zeros_like(positions)))
    return mapping, system_idx.long()[mapping[0]], shifts


@torch.no_grad()
def unbatched_nl(
    positions: Tensor, cell: Tensor, pbc: Tensor | bool, cutoff: Tensor | float, sort_id: bool = False
) -> tuple[Tensor, Tensor]:
    """The full list of one system, as `vesin_nl_ts`, `vesin_nl` and `standard_nl` of TorchSim up to 0.4.

    Args:
        positions, cutoff: as in `torchsim_nl`.
        cell: (3, 3), same dtype, rows are lattice vectors.
        pbc: one flag for all axes, or (3,) bool.
        sort_id: sort by the first index. It ascends in any case; so then do the second and the shifts.

    Returns:
        mapping: (2, P) int64, centre and neighbour of each pair.
        shifts: (P, 3), dtype of `positions`, as `shifts_idx` of `torchsim_nl`.

    Raises:
        ValueError, TypeError: as `diffnl.neighbor_pairs`.
    """
    cutoff, sort_id = _common.length("cutoff", cutoff), _common.flag("sort_id", sort_id)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, sorted=sort_id)
    return pairs.mapping, pairs.shifts.to(positions.dtype)


def _by_system(
    positions: Tensor, cell: Tensor, pbc: Tensor | bool, system_idx: Tensor
) -> tuple[Tensor, Tensor | bool, Tensor]:
    """The cell as (B, 3, 3), flags that are (3 B,) as (B, 3), and the system of each atom."""
    if isinstance(pbc, Tensor) and pbc.ndim == 1 and pbc.numel() != 3:
        pbc = pbc.reshape(-1, 3)
    if cell.ndim == 2 and cell.shape[0] != 3:
        return cell.reshape(-1, 3, 3), pbc, system_idx
    if cell.ndim == 2 and system_idx.numel() > 0:
        # One cell for all systems, whose number is known from the data alone: the device is waited for.
        system_idx, count = _common.systems(system_idx, positions)
        cell = cell.expand(count, 3, 3)
    return cell, pbc, system_idx
