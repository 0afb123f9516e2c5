"""The compiled operators, whose errors become Python's.

The only file that touches ``torch.ops.diffnl``.
"""

import os

import torch
from torch import Tensor

from . import _load, _validate
from ._torch_compat import below_autograd

# A forked child has none of its parent's threads, and waits for them for ever where torch asks for more than
# one, as a square root of 100 numbers does. torch's DataLoader sets one thread in its workers too.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _call(operator, *args):
    """The operator without its own derivative, which is for compilers. In eager mode the Functions of
    diffnl/autograd.py are there for that, and asking twice would cost microseconds."""
    if torch.compiler.is_compiling():
        return operator(*args)
    try:
        with below_autograd():
            return operator(*args)
    except NotImplementedError as error:
        raise _validate.no_backend(*args) from error
    except RuntimeError as error:
        _validate.raise_memory_error(error, args[0])
        _load.raise_device_error(error, args[0].device)
        raise


def _call_on(operator, positions: Tensor, cell: Tensor | None, *args):
    """`_call`; what is wrong with the data is told in the user's words."""
    try:
        return _call(operator, positions, cell, *args)
    except RuntimeError as error:
        _validate.raise_data_error(error, positions, cell)
        raise


def num_rows(num_atoms: int, num_systems: int) -> int:
    """Size of the opaque `rows` of a linked list."""
    return 2 * num_atoms + num_systems + 2


def neighbor_pairs(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system_idx: Tensor | None,
    cutoff: float,
    full: bool,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3), (3, 3) or (B, 3, 3), (3,) or (B, 3) bool, (N,) int64 -> mapping (2, P), shifts (P, 3), vectors
    (P, 3)."""
    return _call_on(
        torch.ops.diffnl.neighbor_pairs.default,
        positions,
        cell,
        pbc,
        system_idx,
        cutoff,
        full,
        sorted,
    )


def neighbor_lists(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system_idx: Tensor | None,
    cutoffs: list[float],
    full: bool,
    sorted: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What `neighbor_pairs` returns for each of several descending cutoffs, on the CPU."""
    operator = torch.ops.diffnl.neighbor_lists.default
    found = _call_on(operator, positions, cell, pbc, system_idx, cutoffs, full, sorted)
    return list(zip(found[::3], found[1::3], found[2::3], strict=True))


def compact_candidates(
    mapping: Tensor, shifts: Tensor, system_idx: Tensor | None, num_atoms: int, num_systems: int
) -> tuple[Tensor, ...]:
    """A list in ascending order of i -> what `select_candidates` takes: offsets (N + 1,) of its rows, j (P,),
    image (P,) and images (K, 4)."""
    return _call(
        torch.ops.diffnl.compact_candidates.default, mapping, shifts, system_idx, num_atoms, num_systems
    )


def candidates_margins(
    old_positions: Tensor,
    old_cell: Tensor,
    candidates: tuple[Tensor, ...],
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system_idx: Tensor | None,
    cutoff: float,
    radius: float,
) -> tuple[Tensor, Tensor, bool]:
    """Whether candidates, pairs to `radius` of old positions and cell, hold all pairs to `cutoff` now.

    Returns margins (B,) float64, for each system by how much they reach beyond these, negative if they do
    not; jumps (N,) int32, three signed bytes each: by how many lattice vectors an atom was moved, (0,) if
    none was; and whether no margin is negative.
    """
    return _call(
        torch.ops.diffnl.candidates_margins.default,
        old_positions,
        old_cell,
        *candidates,
        positions,
        cell,
        pbc,
        system_idx,
        cutoff,
        radius,
    )


def merge_candidates(
    batch: tuple[Tensor, ...], part: tuple[Tensor, ...], atoms: Tensor, systems: Tensor, num_systems: int
) -> tuple[Tensor, ...]:
    """Candidates of a batch, with those of some systems, which have been searched by themselves, replaced.

    `atoms` and `systems`, both ascending, are the numbers in the batch of what is in `part`.
    """
    return _call(torch.ops.diffnl.merge_candidates.default, *batch, *part, atoms, systems, num_systems)


def select_candidates(
    positions: Tensor,
    cell: Tensor,
    system_idx: Tensor | None,
    candidates: tuple[Tensor, ...],
    jumps: Tensor | None,
    cutoff: float,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The candidates within the cutoff: mapping, shifts, vectors, num_pairs; padded with a capacity.

    `jumps`: of the atoms since the search, if there are any.
    """
    return _call(
        torch.ops.diffnl.select_candidates.default,
        positions,
        cell,
        system_idx,
        *candidates,
        jumps,
        cutoff,
        capacity,
    )


# Where the GPU kernels are: there the backward of a full list takes links, 8 bytes a pair, instead of mapping
# and shifts. The shim of the tests has them in the CPU backend's place.
LINKED_DEVICES = {"cuda"} if _load.KERNELS is not None and _load.KERNELS.loaded else set()
if _load.CORE.backend == "hostgpu":
    LINKED_DEVICES.add("cpu")


def linked_neighbor_pairs(
    positions: Tensor, cell: Tensor, pbc: Tensor, system_idx: Tensor | None, cutoff: float, sorted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The full list as `neighbor_pairs` gives it, then links (P,) and rows (2 N + B + 2,) int64.

    Links and rows are opaque: they stand for mapping and shifts in `linked_vectors` and `linked_adjoint`.
    Both are empty where the list cannot be linked (|S| > 31, or 16,384 pairs of one atom).
    """
    return _call_on(
        torch.ops.diffnl.linked_neighbor_pairs.default,
        positions,
        cell,
        pbc,
        system_idx,
        cutoff,
        sorted,
    )


def linked_vectors(
    positions: Tensor, cell: Tensor | None, links: Tensor, rows: Tensor, system_idx: Tensor | None
) -> Tensor:
    """r_j - r_i + S @ h, (P, 3)."""
    return _call(torch.ops.diffnl.linked_vectors.default, positions, cell, links, rows, system_idx)


def linked_adjoint(
    grad: Tensor,
    links: Tensor,
    rows: Tensor,
    system_idx: Tensor | None,
    num_atoms: int,
    num_systems: int,
    need_positions: bool,
    need_cell: bool,
) -> tuple[Tensor, Tensor]:
    """(P, 3) -> gradients (N, 3) and (B, 3, 3); one that is not needed comes back with no rows.

    `system_idx` is for the derivative alone.
    """
    operator = torch.ops.diffnl.linked_adjoint.default
    return _call(operator, grad, links, rows, system_idx, num_atoms, num_systems, need_positions, need_cell)


def search_candidates(
    positions: Tensor, cell: Tensor, pbc: Tensor, system_idx: Tensor | None, radius: float
) -> tuple[Tensor, Tensor]:
    """Links (C,) and rows of a full sorted list to `radius`, on a GPU; no rows where it cannot be linked."""
    return _call_on(torch.ops.diffnl.search_candidates.default, positions, cell, pbc, system_idx, radius)


def select_linked(inputs: tuple, kept: tuple, cutoff: float, radius: float, *options: bool) -> tuple:
    """The sorted pairs within the cutoff from candidates to `radius` on a GPU.

    `inputs` and the first four of `kept` are positions, cell, pbc and system_idx, now and when the candidates
    were searched; links and rows follow. `options`: full, linked, and whether to ask if the candidates hold
    all pairs. Returns their number, -1 if they do not; if asked, whether atoms have jumped since; then
    mapping, shifts, vectors, links and rows; the last two are empty unless the list is full and linked.
    """
    return _call_on(torch.ops.diffnl.select_linked.default, *inputs, *kept, cutoff, radius, *options)


def padded_select_linked(
    inputs: tuple, kept: tuple, cutoff: float, radius: float, capacity: int, *options: bool
) -> tuple[Tensor, ...]:
    """As `select_linked` for a padded list: mapping, shifts, vectors, num_pairs (), links and rows.

    What is `kept`, which ends with num_candidates () and a tally (2,) of searches and reuses, is written if
    the device finds that it must search. `options`: full, linked.
    """
    operator = torch.ops.diffnl.padded_select_linked.default
    return _call(operator, *inputs, *kept, cutoff, radius, capacity, *options)


RELAXED_CAPTURE = 2  # cudaStreamCaptureModeRelaxed, and HIP's


def exchange_capture_mode(like: Tensor, mode: int) -> int:
    """Sets what this thread may do while a graph is captured (cudaThreadExchangeStreamCaptureMode), on the
    device of `like`, and returns what that was."""
    return _call(torch.ops.diffnl.exchange_capture_mode.default, like, mode)


def padded_neighbor_pairs(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system_idx: Tensor | None,
    cutoff: float,
    capacity: int,
    full: bool,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `neighbor_pairs`, with room for C = `capacity` pairs -> mapping (2, C), shifts (C, 3), vectors
    (C, 3), num_pairs ()."""
    return _call(
        torch.ops.diffnl.padded_neighbor_pairs.default,
        positions,
        cell,
        pbc,
        system_idx,
        cutoff,
        capacity,
        full,
        sorted,
    )


def padded_linked_neighbor_pairs(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system_idx: Tensor | None,
    cutoff: float,
    capacity: int,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The full list as `padded_neighbor_pairs` gives it, then links (C,) and rows (2 N + B + 2,) int64.

    A list that cannot be linked has failed.
    """
    return _call(
        torch.ops.diffnl.padded_linked_neighbor_pairs.default,
        positions,
        cell,
        pbc,
        system_idx,
        cutoff,
        capacity,
        sorted,
    )


def pair_vectors(
    positions: Tensor,
    cell: Tensor | None,
    mapping: Tensor,
    shifts: Tensor | None,
    system_idx: Tensor | None,
    num_pairs: Tensor | None = None,
) -> Tensor:
    """r_j - r_i + S @ h, (P, 3). Without `cell` the shifts do not matter and may be None.

    `num_pairs` (), of a padded list: slots behind are 0.
    """
    return _call_on(
        torch.ops.diffnl.pair_vectors.default,
        positions,
        cell,
        mapping,
        shifts,
        system_idx,
        num_pairs,
    )


def pair_vectors_adjoint(
    grad: Tensor,
    mapping: Tensor,
    shifts: Tensor | None,
    system_idx: Tensor | None,
    num_atoms: int,
    num_systems: int,
    need_positions: bool,
    need_cell: bool,
    num_pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(P, 3) -> gradients (N, 3) and (B, 3, 3); one that is not needed comes back with no rows.

    `num_pairs` (), of a padded list: what `grad` holds behind does not matter.
    """
    return _call(
        torch.ops.diffnl.pair_vectors_adjoint.default,
        grad,
        mapping,
        shifts,
        system_idx,
        num_atoms,
        num_systems,
        need_positions,
        need_cell,
        num_pairs,
    )


def is_linked(first: Tensor) -> bool:
    """Whether `first` of a list (first, second, ...) is links (P,) and not mapping (2, P)."""
    return first.ndim == 1


def vectors_of_list(
    positions: Tensor,
    cell: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    system_idx: Tensor | None,
    num_pairs: Tensor | None,
) -> Tensor:
    """`linked_vectors` or `pair_vectors`."""
    if is_linked(first):
        return linked_vectors(positions, cell, first, second, system_idx)
    return pair_vectors(positions, cell, first, second, system_idx, num_pairs)


def adjoint_of_list(
    grad: Tensor,
    first: Tensor,
    second: Tensor | None,
    system_idx: Tensor | None,
    num_pairs: Tensor | None,
    *sizes_and_needs,
) -> tuple[Tensor, Tensor]:
    """`linked_adjoint` or `pair_vectors_adjoint`."""
    if is_linked(first):
        return linked_adjoint(grad, first, second, system_idx, *sizes_and_needs)
    return pair_vectors_adjoint(grad, first, second, system_idx, *sizes_and_needs, num_pairs)
