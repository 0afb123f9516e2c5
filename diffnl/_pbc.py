"""`pbc` in all its forms: a bool, three of them, integers 0 and 1, arrays, tensors (3,) and (B, 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _validate


def flags(value: bool | Sequence[bool] | Tensor | None, like: Tensor, cell: Tensor | None) -> Tensor:
    """Three flags, or (B, 3); returned as a bool tensor (3,) or (B, 3) on the device of `positions`.

    None is for no `cell`: which axes of a cell are periodic has no answer that is right for most.
    """
    if value is None:
        if cell is not None:
            raise ValueError(
                "`pbc` must be given where there is a `cell`; got None: pbc=True makes all axes periodic, "
                "three flags some of them, and cell=None is for open boundaries"
            )
        value = False
    if isinstance(value, bool):
        return torch.full((3,), value, dtype=torch.bool, device=like.device)
    if isinstance(value, Tensor):
        return _from_tensor(value, like)
    if isinstance(value, Sequence) or (hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0):
        of_axes = list(value)
        if len(of_axes) != 3:
            raise ValueError(
                f"`pbc` must be one flag or three, or a tensor (B, 3); got {len(of_axes)} of them"
            )
    else:
        of_axes = [value] * 3
    of_axes = [_flag_of_axis(flag, value) for flag in of_axes]
    # Fills, not a copy from the host: that would wait for the device, and no graph could capture it.
    axes = torch.zeros((3,), dtype=torch.bool, device=like.device)
    for axis, periodic in zip(axes, of_axes, strict=True):
        if periodic:
            axis.fill_(True)
    return axes


def _from_tensor(value: Tensor, like: Tensor) -> Tensor:
    t = _validate._tensor("pbc", value)
    is_bool = t.dtype is torch.bool
    if not is_bool and t.dtype not in _validate.INTEGERS:
        raise TypeError(f"`pbc` must be a bool tensor, or integers 0 and 1; got {t.dtype}: give pbc.bool()")
    _validate.same_device("pbc", t, like)
    if t.ndim == 0:
        t = t.expand(3)
    if t.ndim > 2 or t.shape[-1] != 3:
        raise ValueError(f"`pbc` must have shape (3,) or (B, 3); got {_validate._shape(t)}")
    if is_bool:
        return t
    if not _validate.has_values(t):
        raise TypeError(
            f"`pbc` must be a bool tensor where nobody may look at its values; got {t.dtype}: give pbc.bool()"
        )
    if not torch.equal(t.bool().to(t.dtype), t):
        raise ValueError(f"`pbc` must hold 0 and 1; got {t.tolist()}")
    return t.bool()


def _flag_of_axis(flag: object, pbc: object) -> bool:
    scalar = getattr(flag, "ndim", 0) == 0 and hasattr(flag, "item")
    plain = flag.item() if scalar else flag
    if isinstance(plain, int) and plain in (0, 1):  # a bool is one
        return bool(plain)
    error = ValueError if isinstance(plain, int) else TypeError
    raise error(f"`pbc` must be a bool, three bools or integers 0 and 1, or a tensor of these; got {pbc!r}")
