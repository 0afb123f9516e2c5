"""MACE: its neighbour list, and the edge vectors inside its models, by diffnl.

    from diffnl.adapters import mace

    mace.install()  # for the whole process; `with mace.install(): ...` for a while

To strain the shifts, MACE gathers a cell for each edge; here the edge vectors, and all their derivatives,
come from the strained positions and cells by `diffnl.pair_vectors`.
"""

import math
from contextlib import ExitStack

import numpy as np
import torch

import diffnl

from ..pairs import Pairs
from . import _common


def get_neighborhood(positions, cutoff, pbc=None, cell=None, true_self_interaction=False):
    """`mace.data.neighborhood.get_neighborhood`: the full list of a structure, in NumPy.

    MACE overwrites the rows of `cell` on open axes, in the array it is given, and divides the stress by the
    volume of the result: a slab's comes out too small, by more the farther it lies from the origin, and the
    cell of one with its vacuum along y may have no volume. Here nothing is overwritten, and a cell stays.

    Args:
        positions: (N, 3), N > 0; searched in float64.
        cutoff: > 0; pairs are closer than it, strictly.
        pbc: three bools. None: none.
        cell: (3, 3), rows are lattice vectors. Rows on open axes may be zero. None or zeros: none.
        true_self_interaction: without effect, here and in MACE: i = j with a shift of 0 is never found.

    Returns:
        edge_index (2, P) int32, sender i and receiver j, ascending in i; shifts (P, 3), unit_shifts @ cell;
        unit_shifts (P, 3) int32; a new cell (3, 3), the one given. Vectors are r_j - r_i + shifts.

        Two kinds of systems have no volume, and so no stress, but MACE must be able to divide by one: of
        those without a periodic axis the cell is L times the identity, and rows on open axes that are zero,
        or in the plane or line of the others, become L times a normal of these. L is MACE's length, 5 cutoff
        (1 + max |positions|), but from the middle of the atoms: a stress of nearly 0, and no NaN.

    Raises:
        AssertionError: a `pbc` that is not three bools, a `cell` that is not (3, 3); as in MACE.
        ValueError: `pbc` without a cell, where MACE takes a periodic cube of 1 Å; NaN or infinity, where it
            finds nothing; a cutoff that is not > 0; a singular cell; no atoms.
    """
    pbc = (False, False, False) if pbc is None else pbc
    assert len(pbc) == 3 and all(isinstance(flag, bool | np.bool_) for flag in pbc)
    cutoff, periodic = _common.length("cutoff", cutoff), np.array(pbc, dtype=bool)
    if len(positions) == 0:
        raise ValueError("`positions` must have at least one atom; got none")
    if cell is None or not cell.any():
        if periodic.any():
            raise ValueError("`cell` must be given where `pbc` is true; got None or zeros")
        cell = np.zeros((3, 3))
    assert cell.shape == (3, 3)

    where = (torch.from_numpy(np.array(x, dtype=np.float64, order="C")) for x in (positions, cell))
    pairs = diffnl.neighbor_pairs(*where, tuple(periodic.tolist()), cutoff)
    edge_index, unit_shifts = pairs.mapping.to(torch.int32).numpy(), pairs.shifts.numpy()
    middle = (np.max(positions, axis=0) + np.min(positions, axis=0)) / 2
    cell = _with_a_volume(cell, periodic, 5 * cutoff * (1 + np.max(np.absolute(positions - middle))))
    return edge_index, np.dot(unit_shifts, cell), unit_shifts, cell


def _with_a_volume(cell, periodic, length: float):
    """A copy of the cell in which, where there is no volume, rows on open axes are normals of that length."""
    kept = periodic.copy()
    for axis in np.flatnonzero(~periodic & periodic.any()):
        row = cell[axis].astype(np.float64)
        kept[axis] = np.linalg.norm(_across(row, cell[kept])) > 1e-6 * np.linalg.norm(row)
    if kept.all():
        return cell.copy()
    rows = np.where(kept[:, None], cell, 0.0)
    for axis in np.flatnonzero(~kept):
        # Along x for the first row, y for the second, z for the third, if that is normal to the others.
        normals = [_across(np.eye(3)[k % 3], rows[rows.any(1)]) for k in range(axis, axis + 3)]
        normal = max(normals, key=lambda vector: round(np.linalg.norm(vector), 9))
        rows[axis] = length * normal / np.linalg.norm(normal)
    if np.linalg.det(rows) < 0:
        rows[axis] *= -1  # MACE's volumes have a sign
    return rows


def _across(vector, others):
    """What is left of a vector (3,) without its components along others (M, 3)."""
    basis = np.linalg.qr(others.T.astype(np.float64))[0]
    return vector - basis @ (basis.T @ vector)


def edge_vectors_and_lengths(positions, edge_index, unit_shifts, cell, batch=None, normalize=False, eps=1e-9):
    """`mace.modules.utils.get_edge_vectors_and_lengths`, of unit shifts and a cell instead of shifts.

    Args:
        positions: (N, 3) float32 or float64.
        edge_index: (2, P) integer, sender and receiver.
        unit_shifts: (P, 3) whole numbers, in MACE's data as floats. A pair with others is a ValueError on the
            CPU; on a GPU, where raising would mean waiting, it gets NaN.
        cell: (3B, 3), as in MACE's data, or (B, 3, 3), dtype of the positions; rows are lattice vectors.
        batch: (N,) integer, the system of each atom; needed for more than one cell.
        normalize: divide the vectors by length + `eps`.

    Returns:
        vectors (P, 3), from sender to receiver, and lengths (P, 1). Differentiable to every order, and in the
        cell too: `diffnl.forces_and_stress` of an energy needs no strain.
    """
    shifts, not_whole = _common.whole("unit_shifts", unit_shifts)
    vectors = diffnl.pair_vectors(positions, cell.reshape(-1, 3, 3), edge_index, shifts, batch)
    vectors = vectors if not_whole is None else vectors.masked_fill(not_whole, math.nan)
    lengths = Pairs(edge_index, shifts, vectors).distances.unsqueeze(1)
    return (vectors / (lengths + eps) if _common.flag("normalize", normalize) else vectors), lengths


def prepare_graph(
    data, compute_virials=False, compute_stress=False, compute_displacement=False, lammps_mliap=False
):
    """`mace.modules.utils.prepare_graph` with `edge_vectors_and_lengths` for its edges; same `GraphContext`.

    Edge vectors always follow from `data["cell"]` and `data["unit_shifts"]`: the energy has a gradient in
    `data["cell"]` too. `data["shifts"]` is neither used nor changed. The strain acts about the first atom of
    each system, for the digits of float32 far from the origin, and in products that neither autocast nor TF32
    rounds. MACE's models look for strained positions in `data["positions"]`: they become that entry, and no
    tensor is changed. LAMMPS's ML-IAP stays with MACE.
    """
    from mace.modules import utils

    what = compute_virials, compute_stress, compute_displacement
    if lammps_mliap:
        return utils.prepare_graph(data, *what, lammps_mliap)
    # MACE does everything but the edges, which it does not get to see.
    no_edges = {name: data[name][:0] for name in ("shifts", "unit_shifts")}
    graph = {**data, **no_edges, "edge_index": data["edge_index"][:, :0]}
    context = utils.prepare_graph(graph, *what)
    cell, batch = context.cell.reshape(-1, 3, 3), data["batch"]
    if graph["positions"] is not data["positions"]:  # they are strained: the cell goes along
        positions, strain = context.positions, 0.5 * (context.displacement + context.displacement.mT)
        first = positions.detach()[data["ptr"][:-1].clamp(max=len(positions) - 1)]
        from_first = (positions - first[batch]).unsqueeze(1)
        data["positions"] = positions + _common.product(from_first, strain[batch]).squeeze(1)
        cell = cell + _common.product(cell, strain)
    edges = data["edge_index"], data["unit_shifts"], cell, batch
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
