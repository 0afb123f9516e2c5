"""Checks of arguments, one small function each, and every message a user can meet.

Each message names the argument in backticks, says what it must be, what it got, and where that can be guessed
what to write (`_advice`). Options and `pbc` have files of their own. What only the data can tell (finite, in
range, singular) is found by the search itself; `raise_data_error` gives it words.
"""

import re

import torch
from torch import Tensor

from . import _advice, _load
from ._torch_compat import dispatch_mode_active

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        advice = _advice.for_object(name, value)
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}{advice}")
    if value.layout is not torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor; got {value.layout}: give {name}.to_dense()")
    return value


def _wrong_dtype(name: str, expected: str, t: Tensor) -> TypeError:
    return TypeError(f"`{name}` must {expected}; got {t.dtype}{_advice.for_dtype(name, t)}")


def _integers(name: str, value: Tensor) -> Tensor:
    t = _tensor(name, value)
    if t.dtype not in INTEGERS:
        raise _wrong_dtype(name, "have an integer dtype", t)
    return t


def positions(value: Tensor) -> Tensor:
    """(N, 3), float32 or float64."""
    t = _tensor("positions", value)
    if t.dtype not in FLOATS:
        raise _wrong_dtype("positions", "be float32 or float64", t)
    if t.ndim != 2 or t.shape[1] != 3:
        advice = _advice.for_shape("positions", t)
        raise ValueError(f"`positions` must have shape (N, 3); got {_shape(t)}{advice}")
    return t


def cell(value: Tensor, like: Tensor) -> Tensor:
    """(3, 3) or (B, 3, 3), dtype and device of `positions`."""
    t = _tensor("cell", value)
    if t.dtype != like.dtype:
        raise TypeError(
            f"`cell` must have the dtype of `positions`, {like.dtype}; got {t.dtype}: give "
            "cell.to(positions.dtype)"
        )
    if t.ndim not in (2, 3) or t.shape[-2:] != (3, 3):
        advice = _advice.for_shape("cell", t)
        raise ValueError(f"`cell` must have shape (3, 3) or (B, 3, 3); got {_shape(t)}{advice}")
    same_device("cell", t, like)
    return t


def double(name: str, t: Tensor) -> Tensor:
    """float64: finite differences need the digits."""
    if t.dtype != torch.float64:
        raise TypeError(f"`{name}` must be float64; got {t.dtype}: give {name}.double()")
    return t


def one_cell(t: Tensor) -> Tensor:
    """A checked cell of one system, as (3, 3)."""
    if num_systems(t) != 1:
        raise ValueError(f"`cell` must have shape (3, 3); got {_shape(t)}")
    return t.reshape(3, 3)


def one_pbc(t: Tensor) -> Tensor:
    """Checked flags of one system, as (3,)."""
    if t.numel() != 3:
        raise ValueError(f"`pbc` must be one flag or three; got {_shape(t)}")
    return t.reshape(3)


def per_atom(value: Tensor, like: Tensor) -> Tensor:
    """(N, ...), on the device of `positions`."""
    t = _tensor("per_atom", value)
    if t.ndim == 0 or t.shape[0] != like.shape[0]:
        raise ValueError(
            f"`per_atom` must hold tensors of shape (N, ...) with N = {like.shape[0]}; got {_shape(t)}"
        )
    same_device("per_atom", t, like)
    return t.detach()


def num_systems(cell: Tensor) -> int:
    """B of a checked (3, 3) or (B, 3, 3) cell."""
    return 1 if cell.ndim == 2 else cell.shape[0]


def same_device(name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(
            f"`{name}` must be on the device of `positions`, {like.device}; got {t.device}: give "
            f"{name}.to(positions.device)"
        )


def system_idx(value: Tensor | None, like: Tensor) -> Tensor | None:
    """(N,), any integer dtype; returned as int64."""
    if value is None:
        return None
    t = _integers("system_idx", value)
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"`system_idx` must have shape (N,) = ({like.shape[0]},); got {_shape(t)}")
    same_device("system_idx", t, like)
    return t.to(torch.int64)


def systems(
    cell: Tensor | None, pbc: Tensor, system_idx: Tensor | None, positions: Tensor, *, may_wait: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Settles the number of systems B; returns `cell`, (3, 3) or (B, 3, 3), `pbc`, (3,) or (B, 3), and
    `system_idx`.

    B is the number of cells. Without a cell it is the number of rows of a (B, 3) `pbc`, or one more than the
    largest `system_idx`, or 1. Without a cell systems are groups of atoms and nothing else: if most would be
    empty, they are numbered anew, so that a stray number costs nothing. Unless it `may_wait` for the device,
    it does not look: a `pbc` that is true without a cell is then a singular cell, which the search finds.
    """
    if may_wait and positions.is_meta and not is_traced():
        raise ValueError(
            "`positions` must have values, which decide how many pairs there are; got a tensor on the meta "
            "device: a list with a `capacity` has shapes without them"
        )
    if cell is None:
        if may_wait and bool(pbc.any()):
            raise ValueError("`cell` must be given where `pbc` is true; got None")
        if pbc.ndim == 2:
            count = pbc.shape[0]
        elif system_idx is not None and not may_wait:
            raise ValueError(
                "`cell` must be given with `system_idx` where there is a `capacity`: (B, 3, 3), zeros for "
                "open systems; got None"
            )
        elif system_idx is not None and system_idx.numel() > 0:
            system_idx, count = count_systems(system_idx, positions)
        else:
            count = 1
        cell = positions.new_zeros((count, 3, 3))
    count = num_systems(cell)
    if pbc.ndim == 2 and pbc.shape[0] != count:
        raise ValueError(
            f"`pbc` must have shape (3,) or (B, 3) with B = {count}, the number of cells; got {_shape(pbc)}"
        )
    atoms_have_systems(cell, system_idx, positions)
    return cell, pbc, system_idx


def count_systems(system_idx: Tensor, positions: Tensor) -> tuple[Tensor, int]:
    """The system of each atom and the number of systems, from (N,) `system_idx` alone: the device is waited
    for. Where most systems would be empty they are numbered anew: a stray number costs nothing."""
    count = max(int(system_idx.max()) + 1, 1) if system_idx.numel() > 0 else 1
    if count > 2 * positions.shape[0] and has_values(system_idx):
        if int(system_idx.min()) < 0:
            system_of_atom(system_idx, positions.new_zeros((1, 0, 0)).expand(count, 0, 0), positions)
        used, system_idx = torch.unique(system_idx, return_inverse=True)
        count = len(used)
    return system_idx, count


def atoms_have_systems(cell: Tensor, system_idx: Tensor | None, positions: Tensor) -> None:
    """There is a cell for the atoms, and where there are several, `system_idx` says which."""
    count = num_systems(cell)
    if count == 0 and positions.shape[0] > 0:
        raise ValueError(
            f"`cell` must hold at least one cell for {positions.shape[0]} atoms; got {_shape(cell)}"
        )
    if count > 1 and system_idx is None:
        raise ValueError(
            f"`system_idx` must be given, of shape ({positions.shape[0]},), for {count} cells; got None"
        )


def system_of_atom(system_idx_value: Tensor | None, cell: Tensor, positions: Tensor) -> Tensor | None:
    """`system_idx` for the B cells of `cell`; None where all atoms are in one system. Its values are checked
    where there are any yet."""
    index = system_idx(system_idx_value, positions)
    atoms_have_systems(cell, index, positions)
    if index is None or index.numel() == 0:
        return None
    outside = (index < 0) | (index >= num_systems(cell))
    if has_values(index) and bool(outside.any()):
        atom = int(torch.nonzero(outside)[0])
        raise data_error("system_idx_out_of_range", positions, cell, int(index[atom]), atom)
    return None if num_systems(cell) == 1 else index


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA or HIP graph is being captured, in which nothing can wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_traced() -> bool:
    """Whether something compiles, traces or fakes operators, instead of only running them."""
    return torch.compiler.is_compiling() or dispatch_mode_active()


def has_values(t: Tensor) -> bool:
    """Whether Python may look at values: not where there are none, nor where operations are compiled, traced
    or captured for later."""
    return not (t.is_meta or is_traced() or is_capturing(t.device))


def mapping(value: Tensor, like: Tensor) -> Tensor:
    """(2, P), any integer dtype; returned as int64."""
    t = _integers("mapping", value)
    if t.ndim != 2 or t.shape[0] != 2:
        raise ValueError(f"`mapping` must have shape (2, P); got {_shape(t)}")
    same_device("mapping", t, like)
    return t.to(torch.int64)


def shifts(value: Tensor, mapping: Tensor) -> tuple[Tensor, Tensor]:
    """(P, 3), any integer dtype with values that fit int32; returned as int32, with the `mapping` for it.

    Where nobody may look at the values, a pair whose shift does not fit gets atom numbers that are out of
    range, and so the fate of such pairs: NaN on a GPU.
    """
    t = _integers("shifts", value)
    if t.ndim != 2 or t.shape != (mapping.shape[1], 3):
        raise ValueError(f"`shifts` must have shape (P, 3) = ({mapping.shape[1]}, 3); got {_shape(t)}")
    same_device("shifts", t, mapping)
    fitting = t.to(torch.int32)
    if t.dtype != torch.int64:
        return fitting, mapping
    if t.device.type != "cpu" or not has_values(t):
        return fitting, mapping.masked_fill((fitting != t).any(1), -1)
    if not torch.equal(fitting.to(torch.int64), t):
        pair = int((fitting != t).any(1).nonzero()[0])
        raise ValueError(f"`shifts` must fit int32; got {t[pair].tolist()} in pair {pair}")
    return fitting, mapping


def strain(value: Tensor, cell: Tensor) -> Tensor:
    """Shape, dtype and device of `cell`."""
    t = _tensor("strain", value)
    if t.dtype != cell.dtype:
        raise TypeError(f"`strain` must have the dtype of `cell`, {cell.dtype}; got {t.dtype}")
    if t.shape != cell.shape:
        raise ValueError(f"`strain` must have the shape of `cell`, {_shape(cell)}; got {_shape(t)}")
    same_device("strain", t, cell)
    return t


def energy(value: Tensor, num_systems: int | None) -> Tensor:
    """() or (B,), with a graph behind it. B is free where there is no cell to count."""
    t = _tensor("energy", value)
    if t.ndim > 1 or (t.ndim == 1 and num_systems not in (None, t.shape[0])):
        expected = "(B,)" if num_systems is None else f"(B,) = ({num_systems},)"
        raise ValueError(f"`energy` must have shape () or {expected}; got {_shape(t)}")
    if not t.requires_grad:
        raise ValueError(
            "`energy` must be computed from `positions` and `cell` with gradients enabled; got a tensor "
            "without a graph"
        )
    return t


def depends_on_positions(gradient: Tensor | None, positions: Tensor) -> None:
    """Autograd's gradient of the energy by `positions` is there, or there are no atoms."""
    if gradient is None and positions.shape[0] > 0:
        raise ValueError(
            "`energy` must depend on `positions`; got one that was computed without that tensor: pass the "
            "very tensor the energy was computed from, not a copy made before or after (detach, clone, to)"
        )


def ends_in(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    t = _tensor(name, value)
    if tuple(t.shape[-len(shape) :]) != shape:
        raise ValueError(f"`{name}` must have shape (..., {', '.join(map(str, shape))}); got {_shape(t)}")


def shape_of_cell(name: str, value: Tensor, cell: Tensor) -> None:
    ends_in("cell", cell, (3, 3))
    if _tensor(name, value).shape != cell.shape:
        raise ValueError(f"`{name}` must have the shape of `cell`, {_shape(cell)}; got {_shape(value)}")


def requires_grad(name: str, t: Tensor) -> Tensor:
    if not t.requires_grad:
        raise ValueError(
            f"`{name}` must require a gradient; got requires_grad=False: call {name}.requires_grad_() before "
            "the energy is computed"
        )
    return t


# ------------------------------------------------------------------------------ faults of the data

DATA_ERRORS = {
    "positions_not_finite": "`positions` must be finite; got {row} for atom {a}",
    "cell_not_finite": "`cell` must be finite; got {row} for system {a}",
    "cell_singular": (
        "`cell` must have linearly independent vectors on its periodic axes, with lengths between 1e-72 and "
        "1e74; got {row} for system {a}"
    ),
    "system_idx_out_of_range": "`system_idx` must be in [0, {systems}); got {a} for atom {b}",
    "shift_overflows": (
        "`positions` must lie within 2**31 cells of each other, so that `shifts` fit int32; got atoms "
        "further apart, or a `cutoff` that long, in system {a}"
    ),
    "images_blur": (
        "`positions` must lie near enough to each other that {dtype} can tell periodic images apart; got "
        "atoms (or a `cutoff`) so many cells apart in system {a} that rounding is of the order of the "
        "distance between images: wrap the positions into the cell, or use float64"
    ),
    "not_linkable": (
        "`positions` must be such that no pair spans more than 31 cells and no atom has 16,384 pairs or "
        "more, where a list with a `capacity` has a skin or is a full one and differentiated on a GPU; got "
        "more: wrap the positions into the cell, or take full=False and no skin"
    ),
    "mapping_out_of_range": "`mapping` must hold atom numbers in [0, {atoms}); got {a} in pair {b}",
    "mapping_across_systems": (
        "`mapping` must hold pairs of atoms of one system; got atom {a} with atom {b} of another"
    ),
}


def data_error(code: str, positions: Tensor, cell: Tensor | None, a: int, b: int = 0) -> ValueError:
    """The ValueError for a fault `code` found in the data; `a` and `b` are the numbers in its message."""
    if code == "positions_not_finite":
        source = positions
    elif code in ("cell_not_finite", "cell_singular"):
        source = cell.reshape(-1, 3, 3)
    else:
        source = None
    return ValueError(
        DATA_ERRORS[code].format(
            a=a,
            b=b,
            row=None if source is None else source.detach()[a].tolist(),
            systems=None if cell is None else num_systems(cell),
            atoms=positions.shape[0],
            dtype=positions.dtype,
        )
    )


# The kinds of faults in csrc/errors.h, from 1.
FAULTS = (
    "positions_not_finite",
    "cell_not_finite",
    "cell_singular",
    "system_idx_out_of_range",
    "shift_overflows",
    "images_blur",
    "not_linkable",
)
FAULT_BITS = 56


def padded_error(
    fault: int, positions: Tensor | None, cell: Tensor | None, system_idx: Tensor | None
) -> ValueError:
    """The ValueError for a fault that a padded list holds. Where nobody has kept the inputs, as in a compiled
    graph, they are None, and it says less."""
    code, number = FAULTS[(fault >> FAULT_BITS) - 1], fault & ((1 << FAULT_BITS) - 1)
    if positions is None:
        return ValueError(f"the input of the search was bad: {code} ({number})")
    if code == "system_idx_out_of_range":
        return data_error(code, positions, cell, int(system_idx[number]), number)
    return data_error(code, positions, cell, number)


def overflow(num_pairs: int, capacity: int) -> ValueError:
    return ValueError(
        "`capacity` must be at least the number of pairs, or with a skin on a GPU what leaves room for its "
        f"candidates, {num_pairs}; got {capacity}"
    )


def no_backend(*tensors: Tensor | None) -> ValueError:
    devices = sorted({str(t.device) for t in tensors if isinstance(t, Tensor)})
    on_gpu = any(device.startswith("cuda") for device in devices)
    advice = f": {_load.no_kernels()}" if on_gpu else ": move them"
    return ValueError(
        "`positions` must be on a device that this build of diffnl has kernels for, see diffnl.build_info(); "
        f"got tensors on {', '.join(devices)}{advice}"
    )


def not_in_compiled_transforms() -> NotImplementedError:
    return NotImplementedError(
        "a list inside torch.compile cannot be differentiated by torch.func: differentiate with "
        "torch.autograd.grad there, see docs/compile.md, or leave torch.func.grad uncompiled"
    )


def not_scriptable() -> TypeError:
    return TypeError(
        "NeighborList cannot be compiled by torch.jit.script: export the model with torch.export, as "
        "examples/deploy does, or compile it with torch.compile"
    )


def _fault_of(error: RuntimeError) -> tuple[str, int, int] | None:
    """What the compiled library reports, and its numbers; None for any other error."""
    found = re.search(r"diffnl: (\w+) (-?\d+) (-?\d+)", str(error))
    return found and (found[1], int(found[2]), int(found[3]))


def raise_data_error(error: RuntimeError, positions: Tensor, cell: Tensor | None) -> None:
    """Raises the user's form of a fault the compiled library reports; returns if `error` is not one."""
    fault = _fault_of(error)
    if fault is not None:
        raise data_error(fault[0], positions, cell, *fault[1:]) from None


# Codes of the compiled library for memory that torch did not give.
MEMORY_ERRORS = {
    "out_of_memory": (
        "`cutoff`, with the `skin` if there is one, must leave few enough pairs to hold; got at least {a} "
        "pairs, which need {bytes} bytes"
    ),
    "capacity_out_of_memory": "`capacity` must fit in memory; got {a} pairs, which need {bytes} bytes",
    "no_memory": "the atoms and systems, or gradients of their pairs, need a tensor of {bytes} bytes",
}


def raise_memory_error(error: RuntimeError, like: Tensor) -> None:
    """Raises torch's out-of-memory error in the user's words, for tensors like `like`; returns if `error` is
    another one."""
    fault = _fault_of(error)
    if fault is None or fault[0] not in MEMORY_ERRORS:
        return
    code, a, _ = fault
    num_bytes = a if code == "no_memory" else a * (28 + 3 * like.element_size())
    text = MEMORY_ERRORS[code].format(a=a, bytes=num_bytes)
    raise torch.OutOfMemoryError(f"out of memory: {text}") from _refusal(num_bytes, like.device)


def _refusal(num_bytes: int, device: torch.device) -> torch.OutOfMemoryError | None:
    """What torch says of a request for so much memory. Its C interface did not say why it gave none: on a GPU
    an earlier kernel may have failed, which is then raised here."""
    if device.type == "cpu" or num_bytes >= 2**63:
        return None  # the allocator's file, line and number of bytes; or torch has no integer for the request
    try:
        torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as reason:
        return reason
    return None
