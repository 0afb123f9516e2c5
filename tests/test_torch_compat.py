"""A torch without the private names that diffnl uses costs time, and changes no result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffnl
from diffnl import _torch_compat

TESTS = Path(__file__).parent
NAMES = [
    "_C._AutoDispatchBelowAutograd",
    "_C._are_functorch_transforms_active",
    "_C._len_torch_dispatch_stack",
    "_functorch.utils.unwrap_dead_wrappers",
    "_assert_async",
    *(["_C._cuda_getCurrentRawStream"] if torch.backends.cuda.is_built() else []),
]


@pytest.mark.parametrize("name", NAMES)
def test_this_torch_has_the_name(name):
    """If a new torch has lost one, everything goes on to work, more slowly: time to look for another way."""
    assert _torch_compat._private(name, None) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_missing_is_replaced(name, monkeypatch):
    monkeypatch.delattr(f"torch.{name}")
    replacement = object()
    assert _torch_compat._private(name, replacement) is replacement


def with_replacements(*command) -> str:
    # A pytest that is started here is none of the workers of this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["DIFFNL_PUBLIC_TORCH"] = "1"
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_replacements_are_in_force():
    names = "below_autograd", "apply_directly", "assert_async"
    code = f"from diffnl._torch_compat import *; print(*(f.__name__ for f in ({', '.join(names)})))"
    assert with_replacements("-c", code).split() == ["no_grad", "_public_apply", "_public_assert"]


@pytest.mark.parametrize("check", [_torch_compat.assert_async, _torch_compat._public_assert])
def test_an_assertion_raises_where_it_is_false(check):
    check(torch.tensor(True), "words")
    check(torch.tensor(3), "words")
    for false in (torch.tensor(False), torch.tensor([0])):
        with pytest.raises(RuntimeError, match="words"):
            check(false, "words")


def test_an_assertion_leaves_values_alone_that_nobody_may_look_at():
    _torch_compat._public_assert(torch.tensor(False, device="meta"), "words")
    with torch._subclasses.FakeTensorMode():
        _torch_compat._public_assert(torch.tensor(False), "words")


def test_an_assertion_waits_for_a_gpu(gpu):
    _torch_compat._public_assert(torch.tensor(True, device="cuda"), "words")
    with pytest.raises(RuntimeError, match="words"):
        _torch_compat._public_assert(torch.tensor(False, device="cuda"), "words")


def test_suite_without_private_names():
    """What differs: Functions, transforms and dispatch modes."""
    files = [str(TESTS / f"test_{name}.py") for name in ("autograd", "compile", "derivatives", "skin")]
    chosen = "test_autograd or eager_calls or vmap or torch_func or jvp or forward_mode or traces"
    out = with_replacements("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert " passed" in out


def test_fakes_are_seen():
    """Values of fake tensors may not be looked at: what counts dispatch modes must notice theirs."""
    assert not _torch_compat._makes_fakes()
    with torch._subclasses.FakeTensorMode():
        assert _torch_compat._makes_fakes()
    assert diffnl.neighbor_pairs(torch.zeros(2, 3), None, None, 1.0).mapping.shape == (2, 2)
