"""MACE: its neighbour list, and the edge vectors inside its models, by diffnl.

    from diffnl.adapters import mace

    mace.install()  # for the whole process; `with mace.install(): ...` for a while

To strain the shifts, MACE gathers a cell for each edge; here the edge vectors, and all their derivatives,
come from the strained positions and cells by `diffnl.pair_vectors`.
"""

from contextlib import ExitStack

import numpy as np
import torch

import diffnl


def get_neighborhood(positions, cutoff, pbc=None, cell=None, true_self_interaction=False):
    """`mace.data.neighborhood.get_neighborhood`: the full list of a structure, in NumPy.

    Args:
        positions: (N, 3), N > 0; searched in float64.
        cutoff: > 0; pairs are closer than it, strictly.
        pbc: three bools. None: none.
        cell: (3, 3), rows are lattice vectors. None or zeros: the identity. As in MACE, its rows on open axes
            are **overwritten**, by 5 cutoff (1 + max |positions|) along x, y or z.
        true_self_interaction: without effect, here and in MACE: i = j with a shift of 0 is never found.

    Returns:
        edge_index (2, P) int32, sender i and receiver j, ascending in i; shifts (P, 3), unit_shifts @ cell;
        unit_shifts (P, 3) int32; `cell` with its new rows. Vectors are r_j - r_i + shifts.

    Raises:
        AssertionError: a `pbc` that is not three bools, a `cell` that is not (3, 3); as in MACE.
        ValueError: `pbc` without a cell, where MACE takes a periodic cube of 1 Å; NaN or infinity, where it
            finds nothing; a cutoff that is not > 0; a singular cell; no atoms.
    """
    pbc = (False, False, False) if pbc is None else pbc
    assert len(pbc) == 3 and all(isinstance(flag, bool | np.bool_) for flag in pbc)
    if cell is None or not cell.any():
        if any(pbc):
            raise ValueError("`cell` must be given where `pbc` is true; got None or zeros")
        cell = np.identity(3)
    assert cell.shape == (3, 3)
    open_axes = ~np.array(pbc, dtype=bool)
    length = (np.max(np.absolute(positions)) + 1) * 5 * cutoff
    cell[open_axes] = length * np.identity(3)[open_axes]

    where = (torch.from_numpy(np.array(x, dtype=np.float64, order="C")) for x in (positions, cell))
    pairs = diffnl.neighbor_pairs(*where, tuple(pbc), cutoff)
    edge_index, unit_shifts = pairs.mapping.to(torch.int32).numpy(), pairs.shifts.numpy()
    return edge_index, np.dot(unit_shifts, cell), unit_shifts, cell


def edge_vectors_and_lengths(positions, edge_index, unit_shifts, cell, batch=None, normalize=False, eps=1e-9):
    """`mace.modules.utils.get_edge_vectors_and_lengths`, of unit shifts and a cell instead of shifts.

    Args:
        positions: (N, 3) float32 or float64.
        edge_index: (2, P) integer, sender and receiver.
        unit_shifts: (P, 3) whole numbers, in MACE's data as floats.
        cell: (3B, 3), as in MACE's data, or (B, 3, 3), dtype of the positions; rows are lattice vectors.
        batch: (N,) integer, the system of each atom; needed for more than one cell.
        normalize: divide the vectors by length + `eps`.

    Returns:
        vectors (P, 3), from sender to receiver, and lengths (P, 1). Differentiable to every order, and in the
        cell too: `diffnl.forces_and_stress` of an energy needs no strain.
    """
    shifts = unit_shifts.to(torch.int32)
    vectors = diffnl.pair_vectors(positions, cell.reshape(-1, 3, 3), edge_index, shifts, batch)
    lengths = torch.linalg.norm(vectors, dim=-1, keepdim=True)
    return (vectors / (lengths + eps) if normalize else vectors), lengths


def prepare_graph(
    data, compute_virials=False, compute_stress=False, compute_displacement=False, lammps_mliap=False
):
    """`mace.modules.utils.prepare_graph` with `edge_vectors_and_lengths` for its edges; same `GraphContext`.

    Edge vectors always follow from `data["cell"]` and `data["unit_shifts"]`: the energy has a gradient in
    `data["cell"]` too. `data["shifts"]` is neither used nor changed. LAMMPS's ML-IAP stays with MACE.
    """
    from mace.modules import utils

    what = compute_virials, compute_stress, compute_displacement
    if lammps_mliap:
        return utils.prepare_graph(data, *what, lammps_mliap)
    # MACE does everything but the edges, which it does not get to see.
    no_edges = {name: data[name][:0] for name in ("shifts", "unit_shifts")}
    graph = {**data, **no_edges, "edge_index": data["edge_index"][:, :0]}
    context = utils.prepare_graph(graph, *what)
    cell = context.cell.reshape(-1, 3, 3)
    if graph["positions"] is not data["positions"]:  # they are strained: the cell goes along
        data["positions"] = graph["positions"]
        cell = cell + cell @ (0.5 * (context.displacement + context.displacement.mT))
    edges = data["edge_index"], data["unit_shifts"], cell, data["batch"]
    vectors, lengths = edge_vectors_and_lengths(data["positions"], *edges)
    return context._replace(vectors=vectors, lengths=lengths)


def install() -> ExitStack:
    """Puts `get_neighborhood` and `prepare_graph` where MACE looks for them, for the whole process.

    For all energy models run by Python, in training and in the ASE calculator. Models with dipoles, and what
    is TorchScript already, keep MACE's edge vectors. `close()` of what it returns undoes it, as does `with`.
    """
    from mace import data
    from mace.data import atomic_data, neighborhood
    from mace.modules import extensions, models

    undo = ExitStack()
    places = {get_neighborhood: (data, atomic_data, neighborhood), prepare_graph: (models, extensions)}
    for ours, module in ((ours, module) for ours, modules in places.items() for module in modules):
        undo.callback(setattr, module, ours.__name__, getattr(module, ours.__name__))
        setattr(module, ours.__name__, ours)
    return undo
