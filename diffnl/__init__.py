"""diffnl: the neighbour list that a model can differentiate through."""

from . import reference
from ._ops import build_info
from ._version import __version__
from .neighbors import NeighborList, Pairs, neighbor_pairs, pair_vectors
from .stress import forces_and_stress, strained

__all__ = [
    "NeighborList",
    "Pairs",
    "__version__",
    "build_info",
    "forces_and_stress",
    "neighbor_pairs",
    "pair_vectors",
    "reference",
    "strained",
]
