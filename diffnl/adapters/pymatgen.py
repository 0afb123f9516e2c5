"""pymatgen: `find_points_in_spheres`, the search behind its structures' neighbours, with ours."""

import math

import numpy as np
import torch

from ..neighbors import neighbor_pairs
from . import _common


def find_points_in_spheres(all_coords, center_coords, r, pbc, lattice, tol=1e-8, min_r=1.0):
    """`pymatgen.optimization.neighbors.find_points_in_spheres`: all points close to each centre.

    A pair is listed if d^2 < r^2 + tol, d being its distance, and for r < min_r if d <= r: pairs at r itself
    belong to the list, and so does a centre's own point, at distance 0. Where the centres are the points this
    costs what the list costs; otherwise the pairs among the points are found too, and dropped.

    Args:
        all_coords: (N, 3) points, of one cell; they may lie anywhere. Any length unit.
        center_coords: (M, 3) centres, which may lie anywhere too.
        r: the radius >= 0, in that unit.
        pbc: three flags.
        lattice: (3, 3), rows are lattice vectors.
        tol: what is added to r^2, so a squared length, whatever its name in `Structure.get_neighbor_list`.
        min_r: the radius >= 0 below which the other rule holds.

    Returns:
        Arrays by ascending centre: centres (P,) int64, points (P,) int64, the images of the points (P, 3)
        float64, distances (P,) float64. pymatgen fixes no order of the points of a centre.

    Raises:
        ValueError: a negative `r`, `tol` or `min_r`; what `neighbor_pairs` raises: values that are not
            finite, a singular lattice on periodic axes; pymatgen checks none of these, and needs a lattice
            that can be inverted on open axes too. No points or no centres make an empty list here, and an
            error there.
    """
    r, tol = _common.length_or_zero("r", r), _common.length_or_zero("tol", tol)
    min_r = _common.length_or_zero("min_r", min_r)
    points, centers = (np.asarray(x, dtype=float).reshape(len(x), 3) for x in (all_coords, center_coords))
    same = np.array_equal(points, centers)
    positions = torch.tensor(points if same else np.concatenate([centers, points]), device="cpu")
    cell = torch.tensor(np.asarray(lattice, dtype=float), device="cpu")
    # A little farther than either rule, which then decides; never 0, which finds no coincident points.
    reach = max(math.sqrt(r * r + tol), 1e-3) * (1.0 + 1e-12)
    # The centres come first: a half list holds each of their pairs with points from the centre's side.
    pairs = neighbor_pairs(positions, cell, _common.axes(pbc), reach, full=same)
    found = *pairs.mapping, pairs.shifts.double(), pairs.vectors
    i, j, images, vectors = (array.numpy() for array in found)
    squares = np.einsum("pc,pc->p", vectors, vectors)
    if same:
        atoms = np.arange(len(points))
        starts = np.searchsorted(i, atoms)
        i, j = (np.insert(array, starts, atoms) for array in (i, j))
        squares, *columns = (np.insert(array, starts, 0.0) for array in (squares, *images.T))
        images = np.stack(columns, axis=1)
    distances = np.sqrt(squares)
    chosen = distances <= r if r < min_r else squares < r * r + tol
    if not same:
        chosen &= (i < len(centers)) & (j >= len(centers))
        j = j - len(centers)
    return tuple(array if chosen.all() else array[chosen] for array in (i, j, images, distances))
