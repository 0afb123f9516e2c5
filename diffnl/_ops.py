"""The compiled operators: loads the library, describes its shapes to torch, turns its errors into Python's.

The only file that touches ``torch.ops.diffnl``.
"""

from pathlib import Path

import torch
from torch import Tensor

from . import _validate


def _load_library() -> None:
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        raise ImportError(
            f"diffnl's compiled library is missing: there is no _C*.so in {folder}. Build it against the "
            "torch of this environment: run `pip install --no-build-isolation .` (or `-e .`) in a checkout "
            "of diffnl, and import diffnl from outside that checkout if you did not use `-e`."
        )
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        raise ImportError(
            f"diffnl's compiled library {libraries[0]} does not load under torch {torch.__version__} (it "
            f"needs torch >= 2.10): {error}. Rebuild it: run `pip install --no-build-isolation .` in a "
            "checkout of diffnl."
        ) from error


_load_library()


def build_info() -> dict:
    """What the compiled library holds.

    Returns:
        ``backends``: list of ``"cpu"``, ``"cuda"``, ``"hip"``; ``torch``: version of torch the library was
        built against (it runs under any torch >= 2.10); ``archs``: GPU architectures, empty for the CPU.
    """
    backends, version, archs = torch.ops.diffnl.build_info().split(";")
    return {"backends": backends.split(","), "torch": version, "archs": archs.split(",") if archs else []}


def neighbor_pairs(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system_idx: Tensor | None,
    cutoff: float,
    full: bool,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3), (B, 3, 3), (B, 3) bool, (N,) int64 -> mapping (2, P), shifts (P, 3), vectors (P, 3)."""
    try:
        return torch.ops.diffnl.neighbor_pairs(positions, cell, pbc, system_idx, cutoff, full, sorted)
    except RuntimeError as error:
        _validate.raise_data_error(error, positions, cell)
        raise


def pair_vectors(
    positions: Tensor, cell: Tensor | None, mapping: Tensor, shifts: Tensor | None, system_idx: Tensor | None
) -> Tensor:
    """r_j - r_i + S @ h, (P, 3). Without `cell` the shifts do not matter and may be None."""
    try:
        return torch.ops.diffnl.pair_vectors(positions, cell, mapping, shifts, system_idx)
    except RuntimeError as error:
        _validate.raise_data_error(error, positions, cell)
        raise


def pair_vectors_adjoint(
    grad: Tensor,
    mapping: Tensor,
    shifts: Tensor | None,
    system_idx: Tensor | None,
    num_atoms: int,
    num_systems: int,
    need_positions: bool,
    need_cell: bool,
) -> tuple[Tensor, Tensor]:
    """(P, 3) -> gradients (N, 3) and (B, 3, 3); one that is not needed comes back with no rows."""
    return torch.ops.diffnl.pair_vectors_adjoint(
        grad, mapping, shifts, system_idx, num_atoms, num_systems, need_positions, need_cell
    )


@torch.library.register_fake("diffnl::neighbor_pairs")
def _(positions, cell, pbc, system_idx, cutoff, full=True, sorted=False):
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        positions.new_empty((2, num_pairs), dtype=torch.int64),
        positions.new_empty((num_pairs, 3), dtype=torch.int32),
        positions.new_empty((num_pairs, 3)),
    )


@torch.library.register_fake("diffnl::pair_vectors")
def _(positions, cell, mapping, shifts, system_idx=None):
    return positions.new_empty((mapping.shape[1], 3))


@torch.library.register_fake("diffnl::pair_vectors_adjoint")
def _(grad, mapping, shifts, system_idx, num_atoms, num_systems, need_positions=True, need_cell=True):
    return (
        grad.new_empty((num_atoms if need_positions else 0, 3)),
        grad.new_empty((num_systems if need_cell else 0, 3, 3)),
    )
