"""The neighbour list as a layer: options in, pairs out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _ops, _validate
from .autograd import LinkedSearch, PairVectors, Search, nobody_differentiates


class _PairFields(NamedTuple):
    mapping: Tensor
    shifts: Tensor
    vectors: Tensor


class Pairs(_PairFields):
    """The pairs of a neighbour list: a named tuple of three tensors on the device of the positions.

    Attributes:
        mapping: (2, P) int64. Row 0 is i, the centre; row 1 is j, the neighbour.
        shifts: (P, 3) int32. S, the number of lattice vectors between the images of i and j.
        vectors: (P, 3), dtype of the positions, in their length unit. v = (r_j - r_i) + S @ h; differentiable
            with respect to positions and cell.
    """

    @property
    def distances(self) -> Tensor:
        """(P,) |v|, in the length unit of the positions; computed on first use.

        Differentiable, with zero first and second derivatives (instead of NaN) where v = 0.
        """
        kept = self.__dict__.get("_distances")
        # What was computed without a graph must not stand in for a differentiable value later.
        usable = kept is not None and (
            torch.is_inference_mode_enabled()
            or not kept.is_inference()
            and (kept.requires_grad or not (torch.is_grad_enabled() and self.vectors.requires_grad))
        )
        if not usable:
            kept = self.__dict__["_distances"] = _norm(self.vectors)
        return kept


def _norm(vectors: Tensor) -> Tensor:
    squared = vectors.square().sum(-1)
    zero = squared == 0
    # sqrt is taken of 1 where v = 0, so that no infinite slope is ever multiplied by zero.
    return squared.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def neighbor_pairs(
    positions: Tensor,
    cell: Tensor | None,
    pbc: bool | Sequence[bool] | Tensor | None,
    cutoff: float,
    system_idx: Tensor | None = None,
    *,
    full: bool = True,
    sorted: bool = False,
) -> Pairs:
    """All pairs of atoms, through all periodic images, closer than a cutoff.

    A pair (i, j, S) has the vector v = (r_j - r_i) + S @ h and is listed iff i and j belong to the same
    system, it is not an atom with itself (i = j and S = 0), and v is shorter than the cutoff, strictly.
    S_k = 0 on open axes. v and the test are computed in the dtype of `positions`, without fused multiply-add:
    t_c = ((S0*h0c + S1*h1c) + S2*h2c), v_c = (r_jc - r_ic) + t_c, d2 = (vx*vx + vy*vy) + vz*vz, listed iff
    d2 < cutoff*cutoff, a product rounded once to that dtype.

    Args:
        positions: (N, 3) float32 or float64, any length unit. Atoms may lie outside the cell.
        cell: (3, 3), or (B, 3, 3) for B systems; same dtype. Rows are lattice vectors, of any shape and
            handedness. None: no periodicity.
        pbc: which axes are periodic: a bool, three bools, or a bool tensor (3,) or (B, 3). None: none.
        cutoff: > 0, in the unit of `positions`; may be many times the cell.
        system_idx: (N,) integer, the system of each atom, in any order; systems may be empty. None: one.
        full: list both (i, j, S) and (j, i, -S). Otherwise one of the two: the one with i < j, or for i = j
            the one whose S is lexicographically positive.
        sorted: order each row by (j, S). Rows are always in ascending order of i.

    Returns:
        The pairs. The same input on the same device gives the same bits.

    Raises:
        ValueError: wrong shapes, devices or values; NaN or infinity; a singular cell on a periodic axis.
        TypeError: wrong types or dtypes.
    """
    return _find(positions, cell, pbc, system_idx, _validate.cutoff(cutoff), bool(full), bool(sorted))


class NeighborList(nn.Module):
    """A neighbour list as a layer, without parameters or buffers.

    Args:
        cutoff: > 0, in the length unit of the positions.
        full: list both (i, j, S) and (j, i, -S), or one of the two.
        sorted: order each row by (j, S).

    Raises:
        ValueError, TypeError: a cutoff that is not a finite number > 0.
    """

    def __init__(self, cutoff: float, *, full: bool = True, sorted: bool = False):
        super().__init__()
        self.cutoff = _validate.cutoff(cutoff)
        self.full = bool(full)
        self.sorted = bool(sorted)

    def forward(
        self,
        positions: Tensor,
        cell: Tensor | None = None,
        pbc: bool | Sequence[bool] | Tensor | None = None,
        system_idx: Tensor | None = None,
    ) -> Pairs:
        """The pairs of one system or a batch; see `neighbor_pairs` for shapes, dtypes and errors."""
        return _find(positions, cell, pbc, system_idx, self.cutoff, self.full, self.sorted)

    def extra_repr(self) -> str:
        return f"cutoff={self.cutoff}, full={self.full}, sorted={self.sorted}"


def _find(positions, cell, pbc, system_idx, cutoff: float, full: bool, sorted: bool) -> Pairs:
    positions = _validate.positions(positions)
    cell = None if cell is None else _validate.cell(cell, positions)
    pbc = _validate.pbc(pbc, positions)
    system_idx = _validate.system_idx(system_idx, positions)
    cell, pbc = _validate.systems(cell, pbc, system_idx, positions)
    if not torch.compiler.is_compiling() and nobody_differentiates(positions, cell):
        return Pairs(*_ops.neighbor_pairs(positions, cell, pbc, system_idx, cutoff, full, sorted))
    if full and _wants_links(positions, cell):
        found = LinkedSearch.call(positions, cell, pbc, system_idx, cutoff, sorted)
        return Pairs(*found[:3])
    return Pairs(*Search.call(positions, cell, pbc, system_idx, cutoff, full, sorted))


def _wants_links(positions: Tensor, cell: Tensor) -> bool:
    """Whether a backward may follow that runs from links."""
    return (
        positions.device.type in _ops.LINKED_DEVICES
        and torch.is_grad_enabled()
        and (positions.requires_grad or cell.requires_grad)
        and not torch.compiler.is_compiling()
    )


def pair_vectors(
    positions: Tensor,
    cell: Tensor | None,
    mapping: Tensor,
    shifts: Tensor,
    system_idx: Tensor | None = None,
) -> Tensor:
    """Vectors v = (r_j - r_i) + S @ h of a list that exists, in the exact arithmetic of `neighbor_pairs`.

    Args:
        positions: (N, 3) float32 or float64.
        cell: (3, 3) or (B, 3, 3), same dtype, rows are lattice vectors. None: the shifts do not matter.
        mapping: (2, P) integer, (i, j) of each pair, in any order.
        shifts: (P, 3) integer S of each pair; values fit int32.
        system_idx: (N,) integer, the system of each atom; needed for more than one cell.

    Returns:
        (P, 3), dtype of `positions`; differentiable in `positions` and `cell` to every order.

    Raises:
        ValueError: wrong shapes or devices; on the CPU an atom number outside [0, N) or a system outside
            [0, B), which on a GPU gives that pair NaN instead: raising would mean waiting for the GPU.
        TypeError: wrong types or dtypes.
    """
    positions = _validate.positions(positions)
    cell = None if cell is None else _validate.cell(cell, positions)
    mapping = _validate.mapping(mapping, positions)
    shifts = _validate.shifts(shifts, mapping)
    system_idx = _validate.system_idx(system_idx, positions)
    if cell is None:
        shifts = system_idx = None
    else:
        _validate.atoms_have_systems(cell, system_idx, positions)
    return PairVectors.call(positions, cell, mapping, shifts, system_idx)
