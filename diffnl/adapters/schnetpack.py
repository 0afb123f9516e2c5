"""A neighbour list for SchNetPack, in place of its ASE, MatScipy and torch lists.

from diffnl.adapters.schnetpack import DiffnlNeighborList

It is a `schnetpack.transform.NeighborListTransform` and goes where the others go: into the transforms of a
data module, into `AtomsConverter` and `SpkCalculator`, into the skin and cache wrappers. It pickles, so
DataLoader workers can have it.

It sets _idx_i and _idx_j, (P,) int64, centre and neighbour of the full list, _idx_i ascending, and _offsets,
(P, 3), S @ cell in the dtype of the positions and on their device, differentiable in the cell as theirs.
Pairs are shorter than the cutoff, strictly. It differs where one of theirs is wrong: MatScipy's makes up
another period for a wire whose cell has no volume, and the torch one fails for a single pair.
"""

from typing import TYPE_CHECKING

import torch

import diffnl

from . import _common

if TYPE_CHECKING:
    DiffnlNeighborList: type


def _make():
    """The class, made when it is first asked for: its base class lives in SchNetPack."""
    from schnetpack.transform import NeighborListTransform

    class DiffnlNeighborList(NeighborListTransform):
        """The list of `diffnl.neighbor_pairs` as a SchNetPack transform.

        Args:
            cutoff: > 0, in the length unit of the positions.

        Raises (when called):
            ValueError, TypeError: as `diffnl.neighbor_pairs`; also for a periodic axis without a cell vector.
        """

        def _build_neighbor_list(self, Z, positions, cell, pbc, cutoff):
            with torch.no_grad():
                pairs = diffnl.neighbor_pairs(positions, cell, pbc, _common.length("cutoff", cutoff))
            idx_i, idx_j = pairs.mapping
            return idx_i, idx_j, _common.product(pairs.shifts.to(positions.dtype), cell)

    # Where pickle looks for it.
    DiffnlNeighborList.__qualname__ = "DiffnlNeighborList"
    return DiffnlNeighborList


def __getattr__(name: str):
    if name != "DiffnlNeighborList":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _make()
    return globals()[name]
