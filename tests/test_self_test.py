"""`python -m diffnl`: what it tells, and that it notices a wrong result."""

import os
import subprocess
import sys

import pytest
import torch

import diffnl
from diffnl import __main__ as self_test
from diffnl import _load, _ops

# This torch is for CPUs, or diffnl's library for its GPUs is there.
COMPLETE = _load.KERNELS is None or _load.KERNELS.loaded


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs it in this process on a CPU, without times of large boxes: exit status and output."""
    monkeypatch.setattr(self_test, "SIZES", {"cpu": (30,)})
    monkeypatch.setattr(self_test, "devices", lambda: [torch.device("cpu")])

    def run():
        status = self_test.main()
        return status, capsys.readouterr().out

    return run


def test_the_report_has_what_a_bug_report_needs():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # other tests are about GPUs
    done = subprocess.run(
        [sys.executable, "-m", "diffnl"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == (0 if COMPLETE else 1), done.stdout + done.stderr
    for text in (
        diffnl.__version__,
        torch.__version__,
        sys.version.split()[0],
        diffnl.library_path().split("/")[-1],
    ):
        assert text in done.stdout, text
    assert "float32  list: ok" in done.stdout and "float64  gradients: ok" in done.stdout
    assert " ms" in done.stdout
    assert done.stdout.rstrip().endswith("everything is right") == COMPLETE


def pretend_kernels(monkeypatch, backend, **part):
    """Lets torch be built for CUDA or ROCm, and diffnl's library for it be one of such a state."""
    for name in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, name, "7.1" if name == backend else None)
    kernels = None if backend is None else _load.Part(backend, **part)
    monkeypatch.setattr(_load, "KERNELS", kernels)


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("reason", ["there is no library in the folder", "undefined symbol: some_symbol"])
def test_a_gpu_library_that_does_not_work_is_the_last_word(report, monkeypatch, backend, reason):
    pretend_kernels(monkeypatch, backend, reason=reason)
    status, output = report()
    last = output.rstrip().splitlines()[-1]
    assert status == 1 and last.startswith("the CPU is right; no GPU works: torch"), last
    assert f"was built for {_load.NAMES[backend]}" in last and reason in last
    assert f"run `DIFFNL_BACKEND={backend} pip install --no-build-isolation .`" in last
    assert "everything is right" not in output and "WRONG" not in output


def test_a_cpu_that_is_wrong_is_told_beside_a_gpu_library_that_does_not_work(report, monkeypatch):
    pretend_kernels(monkeypatch, "hip", reason="it does not load")
    monkeypatch.setattr(self_test, "check_list", lambda device, dtype: "a fault")
    status, output = report()
    assert status == 1 and "list: WRONG: a fault" in output
    assert output.rstrip().splitlines()[-1].startswith("the CPU is WRONG: see above; no GPU works: torch")


@pytest.mark.parametrize("backend", [None, "cuda", "hip"])
def test_a_torch_without_a_gpu_in_sight_is_right(report, monkeypatch, backend):
    """A torch for CPUs, or one on a login node whose library loads."""
    pretend_kernels(monkeypatch, backend, path="_library.so", loaded=True)
    status, output = report()
    assert status == 0 and output.rstrip().endswith("everything is right")


def test_help_tests_nothing(report, monkeypatch, capsys):
    monkeypatch.setattr(self_test, "facts", lambda: pytest.fail("the report was run"))
    with pytest.raises(SystemExit) as stopped:
        self_test.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "usage: python -m diffnl" in shown and "exit status is 1" in shown
    with pytest.raises(SystemExit) as stopped:
        self_test.main(["--fast"])
    assert stopped.value.code == 2 and "--fast" in capsys.readouterr().err


def test_a_vector_that_is_off_in_its_last_bit_is_noticed(report, monkeypatch):
    search = _ops.neighbor_pairs

    def off(*args):
        mapping, shifts, vectors = search(*args)
        vectors[3, 1] = torch.nextafter(vectors[3, 1], vectors[3, 1] + 1)
        return mapping, shifts, vectors

    monkeypatch.setattr(_ops, "neighbor_pairs", off)
    status, output = report()
    assert status == 1 and output.rstrip().endswith("something is WRONG: see above")
    assert "float64  list: WRONG: vectors differs from the reference in 1 of" in output


def test_a_list_without_a_pair_is_noticed(report, monkeypatch):
    search = _ops.neighbor_pairs
    monkeypatch.setattr(
        _ops,
        "neighbor_pairs",
        lambda *a: tuple(t[..., :-1] if t.shape[0] == 2 else t[:-1] for t in search(*a)),
    )
    status, output = report()
    assert status == 1 and "WRONG: mapping has shape" in output


@pytest.mark.parametrize("which", [0, 1], ids=["positions", "cell"])
def test_a_wrong_gradient_is_noticed(report, monkeypatch, which):
    adjoint = _ops.pair_vectors_adjoint

    def wrong(*args):
        grads = list(adjoint(*args))
        grads[which] = grads[which] * 1.001
        return tuple(grads)

    monkeypatch.setattr(_ops, "pair_vectors_adjoint", wrong)
    status, output = report()
    assert status == 1 and "float32  list: ok" in output and "gradients: WRONG: d/d" in output


def test_an_error_goes_into_the_report(report, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(_ops, "neighbor_pairs", broken)
    status, output = report()
    assert status == 1 and "list: WRONG: RuntimeError: no kernel image" in output
    assert "30 atoms: WRONG: RuntimeError: no kernel image" in output


def test_every_gpu_is_tested(gpu, capsys):
    assert self_test.main() == 0
    output = capsys.readouterr().out
    for index in range(torch.cuda.device_count()):
        assert f"cuda:{index}  float64  gradients: ok" in output
