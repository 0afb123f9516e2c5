"""diffnl: the neighbour list that a model can differentiate through."""

from . import _fakes as _fakes
from . import reference, testing
from ._load import build_info, cmake_prefix_path, library_path, library_paths
from ._version import __version__
from .neighbors import NeighborList, estimate_capacity, neighbor_pairs, pair_vectors
from .pairs import PaddedPairs, Pairs
from .stress import forces_and_stress, strained

__all__ = [
    "NeighborList",
    "PaddedPairs",
    "Pairs",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "estimate_capacity",
    "forces_and_stress",
    "library_path",
    "library_paths",
    "neighbor_pairs",
    "pair_vectors",
    "reference",
    "strained",
    "testing",
]
