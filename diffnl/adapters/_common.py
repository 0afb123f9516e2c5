"""What several adapters share: checks of arguments that only they have, and products that stay exact.

Messages are those of `diffnl._validate` in form: the argument in backticks, what it must be, what it got.
"""

import math
import numbers
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _validate


def shown(value) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"


def flag(name: str, value) -> bool:
    """True or False, also as a scalar of NumPy or torch, or as 0 or 1. Not whatever is true in an `if`."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, int) or plain not in (0, 1):
        raise TypeError(f"`{name}` must be True or False; got {shown(value)}")
    return bool(plain)


def axes(value) -> tuple[bool, bool, bool]:
    """A `pbc` that came without torch, one flag or three, as three bools."""
    several = list(value) if isinstance(value, Iterable) and getattr(value, "ndim", 1) else [value] * 3
    if len(several) != 3:
        raise ValueError(f"`pbc` must be one flag or three; got {len(several)} of them")
    return tuple(flag("pbc", one) for one in several)


def number(name: str, value) -> float:
    """A number, also of NumPy or torch, as a Python float."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"`{name}` must not require a gradient, which no list has; got {shown(value)}")
    plain = (
        value.item() if getattr(value, "ndim", None) is not None and math.prod(value.shape) == 1 else value
    )
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"`{name}` must be a number; got {shown(value)}")
    return float(plain)


def length(name: str, value) -> float:
    """A finite length > 0, as a Python float."""
    plain = number(name, value)
    if not math.isfinite(plain) or plain <= 0.0:
        raise ValueError(f"`{name}` must be finite and > 0; got {plain}")
    return plain


def length_or_zero(name: str, value) -> float:
    """A finite length >= 0, as a Python float."""
    plain = number(name, value)
    if not math.isfinite(plain) or plain < 0.0:
        raise ValueError(f"`{name}` must be finite and >= 0; got {plain}")
    return plain


def count(name: str, value, least: int | None = 0) -> int:
    """An integer, not below `least`."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer; got {shown(value)}")
    if least is not None and plain < least:
        raise ValueError(f"`{name}` must be >= {least}; got {plain}")
    return int(plain)


def integers(name: str, value) -> Tensor:
    """A tensor of any integer dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor; got {shown(value)}")
    if value.dtype not in _validate.INTEGERS:
        raise TypeError(f"`{name}` must have an integer dtype; got {value.dtype}")
    return value


def may_look(t: Tensor) -> bool:
    """Whether values can be checked: there are some yet, and no device is waited for."""
    return t.device.type == "cpu" and _validate.has_values(t)


def whole(name: str, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Whole numbers (P, 3), of whatever dtype, as int32; and which rows hold anything else, (P, 1) bool.

    Where values may be looked at, such a row is an error, and there is no second tensor.
    """
    if value.dtype == torch.int32:
        return value, None
    found = value.to(torch.int32)
    other = (found != value).any(-1, keepdim=True)  # so is NaN, and what int32 does not hold
    if not may_look(value):
        return found, other
    if bool(other.any()):
        row = int(other.flatten().nonzero()[0])
        got = f"{value[row].tolist()} in row {row}"
        raise ValueError(f"`{name}` must hold whole numbers that fit int32; got {got}")
    return found, None


def systems(system_idx: Tensor, positions: Tensor) -> tuple[Tensor, int]:
    """The system of each atom and the number of systems, known from (N,) `system_idx` alone: the device is
    waited for. Where most would be empty they are numbered anew, for a cell that all of them share."""
    return _validate.count_systems(_validate.system_idx(system_idx, positions), positions)


def warn_of_dropped(name: str, limit: int, kept: int, found: int, stacklevel: int) -> None:
    """A UserWarning where a limit of neighbours has cost edges, at `stacklevel` as seen from the caller."""
    if kept < found:
        dropped = f"{found - kept} of {found} edges"
        warnings.warn(f"`{name}` = {limit} drops {dropped}", stacklevel=stacklevel + 1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrices a (..., n, 3) times b (..., 3, 3), by elements, with derivatives that are so as well.

    `@` and `einsum` are done in bfloat16 under autocast, and in TF32 where float32 products may be.
    """
    x, y, z = a.unsqueeze(-1).unbind(-2)
    first, second, third = b.unsqueeze(-3).unbind(-2)
    return (x * first + y * second) + z * third
