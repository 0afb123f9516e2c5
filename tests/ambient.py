"""The suite under ambient state that a user may have set: another default device, autocast.

    DIFFNL_AMBIENT=meta pytest        torch.set_default_device("meta"): a tensor that is made without saying
                                      where has no values, and nothing that is computed from it has
    DIFFNL_AMBIENT=autocast pytest    forward and backward under torch.autocast("cpu", torch.bfloat16), and on
                                      a GPU if there is one: a matrix product of float32 keeps three digits

Only code in diffnl/ and examples/ meets that state. Tests, and the packages they use, make tensors and
multiply matrices as ever: a mode on top of torch's own takes the state away where the caller is another file.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import diffnl

AMBIENT = os.environ.get("DIFFNL_AMBIENT", "")
if AMBIENT not in ("", "meta", "autocast"):
    raise ValueError(f"DIFFNL_AMBIENT must be meta or autocast; got {AMBIENT}")

OURS = tuple(
    f"{folder}{os.sep}" for folder in (Path(diffnl.__file__).parent, Path(__file__).parents[1] / "examples")
)

# What cannot run there, or would not meet the state, and why. {file or file::test: reason}
STARTS_PROCESSES = [
    *("test_adapters.py", "test_benchmarks.py", "test_build.py", "test_cuda_run.py", "test_load.py"),
    *("test_old_glibc.py", "test_torch_compat.py", "test_versus.py"),
    "test_concurrency.py::test_a_forked_child_of_a_process_that_has_used_threads",
    "test_concurrency.py::test_a_list_of_20_atoms_makes_no_threads",
    "test_concurrency.py::test_after_late_threads_small_regions_run_on_one",
    "test_concurrency.py::test_ddp_on_two_processes_equals_one",
    "test_ops.py::test_import_of_a_library_that_does_not_load_says_what_to_run",
    "test_ops.py::test_import_without_the_library_says_what_to_run",
    "test_self_test.py::test_the_report_has_what_a_bug_report_needs",
    "test_train_mlip.py::test_a_killed_run_ends_as_one_that_was_not",
    "test_train_mlip.py::test_two_processes_go_the_way_of_one",
]
NOT_UNDER = {
    "meta": {
        "test_compile.py": "torch.compile would compile the mode that keeps the state from the tests",
        "test_deploy.py": "torch.export would export it",
        **dict.fromkeys(STARTS_PROCESSES, "what it runs are processes of their own, without the state"),
        "test_progress.py": "about what is printed of what test_train_mlip.py runs",
        "test_properties_script.py": "about what is printed of what test_properties.py runs",
    },
    "autocast": {},
    "": {},
}[AMBIENT]

MATRIX_PRODUCTS = {
    *(
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addmv",
        "baddbmm",
        "einsum",
        "linear",
    ),
    *("tensordot", "multi_dot", "inner", "chain_matmul"),
}


def _is_ours(frame) -> bool:
    return frame.f_code.co_filename.startswith(OURS)


class _TestsMakeTensorsOnTheCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            function in _device_constructors()
            and kwargs.get("device") is None
            and not _is_ours(sys._getframe(1))
        ):
            kwargs = kwargs | {"device": "cpu"}
        return function(*args, **kwargs)


class _TestsMultiplyInFull(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in MATRIX_PRODUCTS and not _is_ours(sys._getframe(1)):
            with _autocast(enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


@contextlib.contextmanager
def _autocast(enabled=True):
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=enabled))
        yield


def start():
    """Before test modules are imported, whose systems are made then."""
    if AMBIENT == "meta":
        torch.set_default_device("meta")
        _TestsMakeTensorsOnTheCpu().__enter__()


@contextlib.contextmanager
def around_a_test():
    with contextlib.ExitStack() as stack:
        if AMBIENT == "autocast":
            stack.enter_context(_autocast())
            stack.enter_context(_TestsMultiplyInFull())
        yield


def skip_what_cannot_run(items):
    for item in items:
        reason = NOT_UNDER.get(item.path.name) or NOT_UNDER.get(f"{item.path.name}::{item.originalname}")
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"not under {AMBIENT}: {reason}"))
