"""Floors under the times of a list, the list that costs nothing, and lists that go wrong without an error."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bandwidth  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

import diffnl  # noqa: E402


def test_floors_are_bytes_over_bandwidth(monkeypatch):
    monkeypatch.setattr(bandwidth, "gpu_peak_mb", lambda call, device: {"peak": 1.0})
    row = {"system": "bulk-1", "pairs": 1000, "vectors_ms": 2.0, "backward_ms": 6.0, "train_ms": None}
    for dtype, size in ((torch.float32, 40), (torch.float64, 52)):
        floor = bandwidth.floors(row, dtype, bandwidth=size * 1e6, device="cpu")
        assert floor["bytes_a_pair"] == size
        assert floor["vectors_floor_ms"] == floor["backward_floor_ms"] == pytest.approx(1.0)
        assert floor["vectors_ratio"] == pytest.approx(2.0) and floor["backward_ratio"] == pytest.approx(6.0)
        assert floor["train_floor_ms"] > 0 and floor["train_ratio"] is None
        assert all(floor[f"{step}_free_ms"] > 0 for step in bandwidth.FLOOR_STEPS)


def test_floors_of_a_batch_and_of_an_older_record_print(monkeypatch, capsys):
    monkeypatch.setattr(bandwidth, "gpu_peak_mb", lambda call, device: {"peak": 1.0})
    row = {"system": "batch-3x27", "pairs": 500, "vectors_ms": 2.0, "backward_ms": 6.0, "train_ms": 9.0}
    floor = bandwidth.floors(row, torch.float32, bandwidth=1e9, device="cpu")
    older = {key: value for key, value in floor.items() if not key.endswith("_free_ms")}
    bandwidth.print_floors([floor, older], 1e9)
    assert capsys.readouterr().out.count("a list that costs nothing: vectors ") == 1


@pytest.mark.parametrize("size", ["27", "2x27"])
def test_the_free_list_is_differentiable_twice_and_reads_no_positions(size):
    system = harness.make_system(size, torch.float64)
    run = bandwidth.free_list(system, num_pairs=7)
    positions, cell = (leaf.detach().mul(torch.nan).requires_grad_() for leaf in system.leaves())
    mapping, shifts, vectors = run(positions, cell, system, True)
    assert mapping.shape == (2, 7) and shifts.shape == (7, 3)
    assert torch.equal(vectors, torch.ones(7, 3, dtype=torch.float64))
    weights = torch.zeros_like(vectors).requires_grad_()
    first = torch.autograd.grad((vectors * weights).sum(), (positions, cell), create_graph=True)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in first)
    (second,) = torch.autograd.grad(first[0].sum() + first[1].sum(), weights)
    assert torch.equal(second, torch.ones(7, 3, dtype=torch.float64))
    assert run(positions, cell, system, True)[2].grad_fn is not vectors.grad_fn


@pytest.mark.parametrize("step", ["vectors", "backward"])
def test_the_free_list_makes_no_memory(step):
    """Not even for gradients that nobody asked for, which autograd fills with zeros if it is let."""
    system = harness.make_system("27", torch.float32)
    call = peers.STEPS[step](bandwidth.free_list(system, num_pairs=10**5), system)
    call()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        call()
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < 1000


def test_the_free_list_waits_for_a_gpu_once_a_call(monkeypatch):
    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(None))
    monkeypatch.setattr(bandwidth, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    system = harness.make_system("27", torch.float32)
    call = peers.STEPS["train"](bandwidth.free_list(system, num_pairs=7), system)
    assert waits == []
    call()
    assert len(waits) == 1


def test_a_report_says_how_far_ahead_any_list_could_be():
    floor = {"system": "bulk-27"} | {f"{step}_free_ms": 2.0 for step in bandwidth.FLOOR_STEPS}
    rows = [
        {"system": "bulk-27", "library": name, "vectors_ms": time, "backward_ms": time, "train_ms": None}
        for name, time in (("slow", 40.0), ("diffnl", 3.0), ("quick", 8.0))
    ]
    rows.append(rows[0] | {"system": "bulk-64", "vectors_ms": 1.0})
    text = "\n".join(report.free({"floors": [floor], "rows": rows}))
    line = next(line for line in text.splitlines() if line.startswith("| bulk-27"))
    assert line == "| bulk-27 | 2 | 1.5x | 4.0x | 2 | 1.5x | 4.0x | 2 | - | - |"
    assert "can beat this ratio" in text
    alone = report.free({"floors": [floor], "rows": rows[1:2]})[1]
    assert alone.endswith("| bulk-27 | 2 | 1.5x | - | 2 | 1.5x | - | 2 | - | - |")
    assert report.free({"floors": [{"system": "bulk-27"}], "rows": rows}) == []


def test_a_list_that_goes_wrong_far_out_is_noticed():
    system = harness.make_system("64", torch.float32)
    pairs = diffnl.neighbor_pairs(system.positions, system.cell, system.pbc, harness.CUTOFF)
    assert bandwidth.is_right(pairs, system)
    mapping, shifts, vectors = (part.clone() for part in pairs)
    vectors[-1] = vectors[-2]
    assert not bandwidth.is_right((mapping, shifts, vectors), system)
    assert not bandwidth.is_right((mapping.flip(1), shifts.flip(0), pairs.vectors.flip(0)), system)


def test_results_that_do_not_repeat_are_noticed():
    system = harness.make_system("27", torch.float64)
    run = peers.LIBRARIES["diffnl"].make(None)
    assert bandwidth.repeats_itself(run, system) == {
        "system": "bulk-27",
        "dtype": "float64",
        "search": True,
        "backward": True,
    }

    def restless(positions, cell, system, with_vectors):
        mapping, shifts, vectors = run(positions, cell, system, with_vectors)
        return mapping, shifts, vectors + torch.rand((), dtype=torch.float64)

    assert not bandwidth.repeats_itself(restless, system)["search"]
