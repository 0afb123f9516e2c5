"""The run on a CUDA machine: its stages, what it reads off logs and profiles, and its report."""

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from short_runs import run_neighbors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cuda_run  # noqa: E402
import report  # noqa: E402
import sanitizer_set  # noqa: E402
import tables  # noqa: E402

import diffnl  # noqa: E402

pytestmark = pytest.mark.usefixtures("threads")  # the benchmarks set torch's


# The set for compute-sanitizer.


def test_the_sanitizer_set_passes(capsys):
    assert sanitizer_set.main(["--device", "cpu", "--cases", "chain,tiny,sparse,mixed,lonely,nothing"]) == 0
    assert re.search(r"\d+ lists of 6 cases right on cpu", capsys.readouterr().out)


def test_the_sanitizer_set_notices_wrong_lists_and_derivatives(monkeypatch):
    case = next(case for case in sanitizer_set.cases() if case.name == "mixed")
    reference = diffnl.reference.neighbor_pairs
    with monkeypatch.context() as patched:
        patched.setattr(diffnl.reference, "neighbor_pairs", lambda *a: reference(*a[:3], 0.9 * a[3], *a[4:]))
        with pytest.raises(AssertionError, match="other pairs than the reference"):
            sanitizer_set.check(case, torch.float32, "cpu")
    right = sanitizer_set.linear_map
    with monkeypatch.context() as patched:
        patched.setattr(sanitizer_set, "linear_map", lambda *arguments: 1.01 * right(*arguments))
        with pytest.raises(AssertionError, match="gradient of positions: off by"):
            sanitizer_set.check(case, torch.float32, "cpu")


# The run.


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    script = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    ended = cuda_run.run([sys.executable, "-c", f"{script}; time.sleep(600)"], tmp_path / "log", 5)
    assert ended.status == "over 5 s" and not ended.ok
    started = Path("/proc", ended.tail(1), "stat")
    for _ in range(100):  # a killed process is there for a moment, as a zombie longer
        if not started.exists() or started.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the command started is still running")
    for code, limit, status in (
        ("print(1)", 100, "ok"),
        ("exit(4)", 100, "exit 4"),
        ("print(1)", 0, "no time left"),
    ):
        assert cuda_run.run([sys.executable, "-c", code], tmp_path / "log", limit).status == status


INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::elementwise<float>(int)+0x120
=========     by thread (1,0,0) in block (0,0,0)
=========
176 lists of 11 cases right on cuda, 9.0 s
========= ERROR SUMMARY: 1 error
"""


def test_sanitizer_logs_are_read():
    read = cuda_run.read_sanitizer_log
    clean = "8 lists of 1 cases right on cuda\n========= ERROR SUMMARY: 0 errors\n"
    assert read(clean, "memcheck")["verdict"] == "clean"
    assert read(clean, "racecheck")["verdict"] == "no summary"
    races = "8 lists of 1 cases right on cuda\n"
    races += "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)"
    assert read(races.format(0, 0), "racecheck")["verdict"] == "clean"
    assert read(races.format(2, 2), "racecheck") | {"elsewhere": None} == {
        "errors": 2,
        "in_diffnl": 0,
        "elsewhere": None,
        "verdict": "errors",
    }
    assert (
        read("========= ERROR SUMMARY: 0 errors\n", "memcheck")["verdict"]
        == "the set did not come to its end"
    )
    # initcheck: an error of torch's own is told and does not count; one of diffnl's, or one not printed, does
    found = read(INITCHECK, "initcheck")
    assert found["verdict"] == "clean" and found["errors"] == 1 and found["in_diffnl"] == 0
    assert found["elsewhere"] == ["void at::native::elementwise<float>(int)"]
    assert read(INITCHECK, "memcheck")["verdict"] == "errors"
    assert read(INITCHECK.replace("at::native", "diffnl"), "initcheck")["verdict"] == "errors"
    assert read(INITCHECK.replace("1 error", "2 errors"), "initcheck")["verdict"] == "errors"


def test_pytest_counts_are_read():
    text = "....\nFAILED tests/test_list.py::test_x\n== 2 failed, 310 passed, 5 skipped in 41.2s ==\n"
    assert cuda_run.pytest_outcome(text) == {"failed": 2, "passed": 310, "skipped": 5}
    assert cuda_run.pytest_outcome("311 passed in 40.10s\n") == {"passed": 311}
    assert cuda_run.pytest_outcome("over\n") == {}


def test_the_report_holds_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    _, record = run_neighbors(tmp_path, "--sizes", "27,64", "--peers", "vesin")
    record["bandwidth"] = 4e12
    record["machine"] |= {"device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0"}
    record["rows"][0]["note"] = "vectors failed: RuntimeError"
    (tmp_path / "neighbors-float32.json").write_text(json.dumps(record))
    log = {"seconds": 9.0, "status": "ok", "log": "x.log"}
    tool = {"errors": 0, "in_diffnl": 0, "elsewhere": [], "verdict": "clean"}
    share = {
        "batch_size": 4,
        "atoms": 61.0,
        "step_ms": 50.0,
        "busy_ms": 9.0,
        "device_share": 0.02,
        "host_share": 0.01,
    }
    machine = {"machine": {"nvcc": "13.0", "commit": "abc1234"}, "date": "2026-01-31"}
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    stages = {
        "build": log | {"build_info": {"backends": ["cpu", "cuda"], "archs": ["9.0"]}},
        "test": log | {"outcome": {"passed": 311}},
        "sanitize": log | {"tools": {"memcheck": log | tool}},
        "bench": log | {"runs": {"float32": log | {"status": "over 9 s"}}},
        "train": log
        | {"runs": {"train": log | {"share": share, "command": "--epochs 3"}}, "table": ["test    unit"]},
    }
    for name, facts in stages.items():
        (tmp_path / f"stage-{name}.json").write_text(json.dumps(facts))
    assert list(report.read_summary(tmp_path)["stages"]) == list(cuda_run.STAGES)
    assert cuda_run.main(["--out", str(tmp_path), "--stages", "", "--report", str(tmp_path / "docs")]) == 0
    page = tmp_path / "docs" / "nvidia-h200.md"
    text = page.read_text()
    own = next(row for row in record["rows"] if row["library"] == "diffnl" and row["system"] == "bulk-64")
    for expected in (
        "# diffnl on NVIDIA H200",
        "| driver | 580.1 |",
        "| commit | abc1234 |",
        "311 passed",
        "| compute-sanitizer memcheck | clean |",
        "| benchmark in float32 | over 9 s | 9 s | the last systems are missing |",
        f"| bulk-64 | {own['pairs']:,} | {tables.show(own['list_ms'], 'list_ms')} (",
        "bulk-27, diffnl: vectors failed: RuntimeError",
        "| 4 | 61 | 50.0 | 9.0 | 2.0% | 1.0% |",
        "--device cuda --epochs 3`: ok",
    ):
        assert expected in text, expected
    assert (page.parent / "nvidia-h200-float32.png").read_bytes().startswith(b"\x89PNG")
    assert (
        report.write_report(tmp_path, tmp_path / "page.md").read_text().startswith("# diffnl on NVIDIA H200")
    )


# The neighbour list's share of a training step.


def profiled(key, kind, count=0, host=0.0, device=0.0, own=0.0, annotation=False):
    """One row of torch's profiler, in microseconds."""
    return SimpleNamespace(
        key=key,
        device_type=kind,
        count=count,
        cpu_time_total=host,
        device_time_total=device,
        self_device_time_total=own,
        is_user_annotation=annotation,
    )


def test_the_layers_share_is_read_off_the_profile(monkeypatch):
    for name in ("ase", "e3nn", "tqdm"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    from mlip.profiling import _operators, share_table

    host, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        profiled("diffnl::neighbor_pairs", host, 4, host=3000.0, device=800.0),
        profiled("diffnl::pair_vectors_adjoint", host, 8, host=1000.0, device=400.0),
        profiled("aten::mm", host, 99, host=9000.0, device=2800.0),
        profiled("void diffnl::count<float>()", gpu, own=1100.0),
        profiled("Memset (Device)", gpu, own=100.0),
        profiled("gemm", gpu, own=2800.0),
        profiled("a span", gpu, own=9999.0, annotation=True),
    ]
    share = _operators(events, steps=4, profiled_ms=10.0, on_gpu=True)
    assert share["operators"]["diffnl::neighbor_pairs"] == {"calls": 1, "host_ms": 0.75, "device_ms": 0.2}
    assert share["host_share"] == pytest.approx(0.1)
    assert share["busy_ms"] == pytest.approx(1.0) and share["device_share"] == pytest.approx(0.3)
    assert share["kernels_ms"] == pytest.approx(0.275)
    text = share_table(
        share | {"steps": 4, "batch_size": 2, "atoms": 8.0, "step_ms": 9.0, "profiled_ms": 10.0}
    )
    assert "on the host: 10.0%" in text and "busy: 30.0%" in text
    assert "busy_ms" not in _operators(events, steps=4, profiled_ms=10.0, on_gpu=False)


def test_the_example_tells_the_layers_share(tmp_path, monkeypatch, capsys):
    for name in ("ase", "e3nn", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import ase.io
    import train_mlip
    from mlip.data import atoms_from_frame, make_copper

    frames = [frame for frame in make_copper(24, seed=1) if len(frame.numbers) <= 8]
    ase.io.write(tmp_path / "train.extxyz", [atoms_from_frame(frame) for frame in frames])
    run = ["--train", str(tmp_path / "train.extxyz"), "--out", str(tmp_path), "--channels", "4"]
    assert train_mlip.main([*run, "--epochs", "1", "--relax-steps", "1", "--profile-layer", "2"]) == 0
    share = json.loads((tmp_path / "layer_share.json").read_text())
    assert share["steps"] == 2 and 0 < share["host_share"] < 1
    calls = [times["calls"] for name, times in share["operators"].items() if name.endswith("neighbor_pairs")]
    assert calls == [1] and len(share["operators"]) == 3  # the search, its backward, and the backward of that
    assert "the neighbour list in 2 training steps" in capsys.readouterr().out
