"""SevenNet's graphs from our list: its list builder, and its input as a differentiable function."""

import numpy as np
import torch
from torch import Tensor

from ..neighbors import neighbor_pairs
from . import _common


def use_diffnl():
    """From now on SevenNet builds every graph from our list: in calculators, `atoms_to_graph` and data sets.

    Returns what built them before: `sevenn.train.dataload._graph_build_f = before` brings it back. It is a
    global of that module, so worker processes that are not forked have to call this as well.
    """
    from sevenn.train import dataload

    before, dataload._graph_build_f = dataload._graph_build_f, graph_build
    return before


def graph_build(cutoff: float, pbc, cell, pos) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Stands in for `sevenn.train.dataload._graph_build_f`: the edges that matscipy gives it, or else ASE.

    Edges are shorter than the cutoff, strictly, and in ascending order of their source. An atom is no
    neighbour of itself at zero shift. The rows of `cell` on open axes stay as they are, and may be zero:
    SevenNet's use of matscipy overwrites them in place, and fails if that makes the cell singular.

    Args:
        cutoff: Å.
        pbc: three flags.
        cell: (3, 3) float64, Å, rows are lattice vectors.
        pos: (N, 3) float64, Å, anywhere.

    Returns:
        source (P,) int64, destination (P,) int64, vectors from source to destination (P, 3) float64, shifts
        (P, 3) int32.
    """
    where = (torch.tensor(np.asarray(x), dtype=torch.float64, device="cpu") for x in (pos, cell))
    pairs = neighbor_pairs(*where, _common.axes(pbc), _common.length("cutoff", cutoff))
    return *pairs.mapping.numpy(), pairs.vectors.numpy(), pairs.shifts.numpy()


def graph(
    positions: Tensor,
    cell: Tensor,
    pbc,
    atomic_numbers: Tensor,
    cutoff: float,
    system_idx: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
):
    """The input of a SevenNet model on the device of the positions, differentiable in positions and cell.

    `unlabeled_atoms_to_graph` and `AtomGraphData.from_numpy_dict` without NumPy. The pairs are found in the
    dtype of the positions. The model's own forces and stress come as ever. For derivatives of the energy
    through the list, of any order, first take its last module away:
    `model.delete_module_by_key("force_output")`.

    Args:
        positions: (N, 3), Å.
        cell: (3, 3); or (B, 3, 3) for a batch, with `model.set_is_batch_data(True)`.
        pbc: as in `diffnl.neighbor_pairs`.
        atomic_numbers: (N,) integer.
        cutoff: Å, `model.cutoff`.
        system_idx: (N,) integer, the system of each atom, for a batch.
        dtype: of the model.

    Returns:
        `sevenn.atom_graph_data.AtomGraphData`. Models with several modalities also want `data_modality`.
    """
    import sevenn._keys as KEY
    from sevenn.atom_graph_data import AtomGraphData

    pairs = neighbor_pairs(positions, cell, pbc, _common.length("cutoff", cutoff), system_idx)
    number = torch.tensor(len(positions), device=positions.device)
    data = {}
    if cell.dim() == 3:
        if system_idx is None:
            system_idx = atomic_numbers.new_zeros(len(positions))
        number = system_idx.new_zeros(len(cell)).index_add(0, system_idx, torch.ones_like(system_idx))
        data[KEY.BATCH] = system_idx.long()
    atomic_numbers = _common.integers("atomic_numbers", atomic_numbers).long()
    a, b, c = cell.detach().unbind(-2)
    data |= {
        KEY.NODE_FEATURE: atomic_numbers,  # the model puts its own numbers there
        KEY.ATOMIC_NUMBERS: atomic_numbers,
        KEY.POS: positions.to(dtype),
        KEY.EDGE_IDX: pairs.mapping,
        KEY.EDGE_VEC: pairs.vectors.to(dtype),
        KEY.CELL_VOLUME: (torch.linalg.cross(a, b) * c).sum(-1).abs().to(dtype),
        KEY.NUM_ATOMS: number.long(),
        KEY.CELL: cell.to(dtype),
        KEY.CELL_SHIFT: pairs.shifts.to(dtype),
        KEY.INFO: {},
    }
    return AtomGraphData(**data)
