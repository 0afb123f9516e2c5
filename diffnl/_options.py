"""Checks of a list's options: numbers and flags. `_validate` has those of tensors.

An option is a Python value, a NumPy scalar or a 0-dimensional tensor; each check returns the Python value.
"""

import math
import numbers
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def shown(value: object) -> str:
    """What a message says that it got: short, whatever the value."""
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"


def _scalar(name: str, value: object) -> object:
    """The Python value of a 0-dimensional tensor or array; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim == 0:
        if value.requires_grad or unpack_dual(value).tangent is not None:
            raise ValueError(
                f"`{name}` must not require a gradient: a list is not differentiable in it, and the vectors "
                f"do not depend on it; got {shown(value)} that does: give the list {name}.detach(), and the "
                "tensor itself to the envelope"
            )
        if value.device.type == "meta":
            raise ValueError(f"`{name}` must have a value; got {shown(value)} on the meta device")
        return value.item()
    if not isinstance(value, Tensor) and hasattr(value, "__array__") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _number(name: str, value: object) -> float:
    value = value if isinstance(value, int | float) else _scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        several = ": several go into a tuple" if name == "cutoff" and getattr(value, "ndim", 0) > 0 else ""
        raise TypeError(f"`{name}` must be a number; got {shown(value)}{several}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def not_negative(name: str, value: float) -> float:
    """A finite number >= 0, as a Python float."""
    number = _number(name, value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"`{name}` must be finite and >= 0; got {number}")
    return number


def cutoff(value: float) -> float:
    """A finite length > 0, as a Python float."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        raise ValueError(f"`cutoff` must be one number, for one list; got {len(value)} in {shown(value)}")
    number = _number("cutoff", value)
    if not math.isfinite(number) or number <= 0.0:
        raise ValueError(f"`cutoff` must be finite and > 0; got {number}")
    return number


def cutoffs(value: float | Sequence[float]) -> float | tuple[float, ...]:
    """A cutoff, or several in a sequence that is not empty."""
    if type(value) is float and 0.0 < value < math.inf:
        return value  # the common case first: a call of few atoms takes ten microseconds
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return cutoff(value)
    if len(value) == 0:
        raise ValueError("`cutoff` must be a number or several; got an empty sequence")
    return tuple(cutoff(one) for one in value)


def skin(value: float) -> float:
    """A finite length >= 0, as a Python float."""
    return not_negative("skin", value)


def slack(value: float) -> float:
    """A finite share >= 0, as a Python float."""
    return not_negative("slack", value)


def capacity(value: int | None) -> int | None:
    """An integer >= 0, or None."""
    if value is None:
        return None
    value = value if isinstance(value, int | torch.SymInt) else _scalar("capacity", value)
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | numbers.Integral):
        raise TypeError(f"`capacity` must be an integer; got {shown(value)}")
    if value < 0:
        raise ValueError(f"`capacity` must be >= 0; got {value}")
    if isinstance(value, int) and value >= 2**63:
        raise ValueError(f"`capacity` must fit int64; got {value}")
    return value if isinstance(value, int | torch.SymInt) else int(value)


def one_list(cutoff: float | tuple, capacity: int | None) -> None:
    if isinstance(cutoff, tuple) and capacity is not None:
        raise ValueError(
            f"`capacity` must be None where there are several cutoffs; got {capacity} for {len(cutoff)}"
        )


def flag(name: str, value: bool) -> bool:
    """True or False: what is only like one of them in an `if` may have been meant for another argument."""
    if value is True or value is False:
        return value
    value = _scalar(name, value)
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {shown(value)}")
    return value


# What other codes call the arguments of a list.
_OTHER_NAMES = {
    "batch": "system_idx",
    "batch_idx": "system_idx",
    "box": "cell",
    "lattice": "cell",
    "pos": "positions",
    "periodic": "pbc",
    "r": "cutoff",
    "r_max": "cutoff",
    "half": "full",
    "max_num_neighbors": "capacity",
}


def unexpected(names: dict, function: str) -> NoReturn:
    """For arguments that `function` does not have."""
    name = next(iter(names))
    ours = _OTHER_NAMES.get(name)
    meant = f": here that is `{ours}`" if ours else ""
    if ours == "system_idx":
        meant += ", (N,) integer, the system of each atom"
    raise TypeError(f"{function} has no argument `{name}`{meant}")
