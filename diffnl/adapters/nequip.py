"""NequIP and Allegro: diffnl as one of NequIP's neighbour-list backends, by the name "diffnl".

    from diffnl.adapters import nequip

    nequip.register()
    transform = NeighborListTransform(r_max=5.0, backend="diffnl")  # nequip.data.transforms

Whatever in NequIP takes the name of a backend then takes this one, the ASE and TorchSim calculators too
(`neighborlist_backend="diffnl"`). Cutoffs per edge type are NequIP's own: it prunes the list up to `r_max`.
Each process that makes lists has to register, and so have spawned workers of a data loader.
"""

import torch
from torch import Tensor

import diffnl

from . import _common


def register(name: str = "diffnl") -> None:
    """Enters `neighbor_list` into NequIP's registry, for CPU and GPU, in place of what has the name there."""
    from nequip.data import register_neighborlist_backend

    options = {"supports_cpu": True, "supports_cuda": True, "overwrite": True}
    register_neighborlist_backend(name, neighbor_list, **options)


def neighbor_list(data: dict[str, Tensor], r_max: float) -> dict[str, Tensor]:
    """The full list of a frame, or of all frames of a batch in one search, written into `data`.

    Only the pairs are written, and they have no gradient: NequIP computes edge vectors in its model, from
    strained positions and cells. Given "edge_vectors" it would take them for LAMMPS's, of one open frame, and
    leave out forces and stress.

    Args:
        data: NequIP's dictionary. Read are "pos" (N, 3) float32 or float64; "cell" (B, 3, 3) and "pbc" (B, 3)
            bool, both or neither, which is open; "batch" (N,) and "num_atoms" (B,), one frame where missing.
        r_max: > 0, in the length unit of the positions; pairs are closer than it, strictly.

    Returns:
        `data`, with "edge_index" (2, P) int64, centre and neighbour, in ascending order of the centre; and
        where there is a cell, "edge_cell_shift" (P, 3) in the dtype of "pos". On the device of "pos".

    Raises:
        ValueError: a periodic axis without a cell vector, which in NequIP's own backends has a length of 1 in
            the search, and of 0 in the edge vectors; a "cell" that is not zero without a "pbc", which there
            makes the list of a molecule; NaN or infinity; see `diffnl.neighbor_pairs`.
    """
    positions, cell, pbc = data["pos"].detach(), data.get("cell"), data.get("pbc")
    dtype = positions.dtype
    if cell is None:
        # Zeros are an open cell. The number of frames is a shape: nothing waits for the device.
        frames = data["num_atoms"].shape[0] if "num_atoms" in data else 1
        vectors = positions.new_zeros((frames, 3, 3))
    else:
        dtype = torch.promote_types(dtype, cell.dtype)
        vectors = cell.detach().reshape(-1, 3, 3).to(dtype)
        if pbc is None and bool(vectors.any()):
            raise ValueError("`pbc` must be in the data where there is a cell; got None")
    pbc = False if pbc is None else pbc.reshape(-1, 3)
    cutoff = _common.length("r_max", r_max)
    pairs = diffnl.neighbor_pairs(positions.to(dtype), vectors, pbc, cutoff, data.get("batch"))
    data["edge_index"] = pairs.mapping
    if cell is not None:
        data["edge_cell_shift"] = pairs.shifts.to(positions.dtype)
    return data
