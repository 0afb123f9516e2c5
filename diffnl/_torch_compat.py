"""torch's private names that diffnl uses, each with a public replacement for a torch that lacks it.

A replacement costs microseconds a call, that of `assert_async` a wait for the GPU, and changes no result. The
environment variable DIFFNL_PUBLIC_TORCH=1 puts all of them in force, which is how the tests try them.
"""

import os
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def _private(path: str, replacement: Any) -> Any:
    """What torch has under a dotted private name, or the replacement."""
    if os.environ.get("DIFFNL_PUBLIC_TORCH") == "1":
        return replacement
    try:
        return resolve_name(f"torch.{path}")  # imports the modules on the way
    except (ImportError, AttributeError):
        return replacement


# A context in which operators skip their autograd kernels; otherwise they run them, and record nothing.
below_autograd: Callable = _private("_C._AutoDispatchBelowAutograd", torch.no_grad)


def _transforms_possible() -> bool:
    """Where nobody can tell, they may be active: `Function.apply` finds out for itself, and a skin keeps
    nothing. While torch.compile runs they are taken for inactive: it refuses a list inside of them anyway."""
    return not torch.compiler.is_compiling()


# Whether torch.func's transforms are active.
transforms_active: Callable[[], bool] = _private("_C._are_functorch_transforms_active", _transforms_possible)


def _makes_fakes() -> bool:
    """Whether a new tensor is anything but a plain one."""
    return type(torch.empty((), device="cpu")) is not Tensor


# Whether a dispatch mode is active, such as the one that fakes tensors.
_num_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack", _makes_fakes)


def dispatch_mode_active() -> bool:
    return _num_modes() > 0


def _public_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The current stream of the GPU with a number, as the integer that it is to CUDA or HIP. An object around it
# takes 2 us to make.
current_stream: Callable[[int], int] = _private("_C._cuda_getCurrentRawStream", _public_stream)


def _public_assert(condition: Tensor, message: str) -> None:
    """Waits for a GPU. Where values may not be looked at nothing is checked."""
    from ._validate import has_values  # which imports this module

    if has_values(condition) and not condition:
        raise RuntimeError(message)


# Raises a RuntimeError if a tensor of one element is false or zero; on a GPU later, without a wait.
assert_async: Callable[[Tensor, str], None] = _private("_assert_async", _public_assert)


def _base_apply(function: type[Function], *args):
    # Tensors of a transform that has ended are replaced by what they hold, as `Function.apply` does.
    return super(Function, function).apply(*_unwrap_dead_wrappers(args))


def _public_apply(function: type[Function], *args):
    return function.apply(*args)


_unwrap_dead_wrappers = _private("_functorch.utils.unwrap_dead_wrappers", None)

# `Function.apply` where no transform is active and all arguments are positional, without the 10 to 40 us that
# go into binding arguments to their names.
apply_directly: Callable = _public_apply if _unwrap_dead_wrappers is None else _base_apply
