"""The benchmarks: same pairs for all libraries, refusals and gaps in the open, rows in the JSON."""

import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bandwidth  # noqa: E402
import cuda_run  # noqa: E402
import harness  # noqa: E402
import neighbors  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import sanitizer_set  # noqa: E402
import scaling  # noqa: E402
import tables  # noqa: E402

import diffnl  # noqa: E402

CPU_LIBRARIES = [name for name, library in peers.LIBRARIES.items() if "cpu" in library.devices]


@pytest.fixture(autouse=True)
def same_thread_count():
    """The benchmarks set torch's threads; the other tests must not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_neighbors(tmp_path, *arguments):
    """Exit status and JSON of a short run without memory measurements."""
    path = tmp_path / "neighbors.json"
    common = ["--threads", "1", "--budget", "0.001", "--no-memory", "--json", str(path)]
    return neighbors.main([*common, *arguments]), json.loads(path.read_text())


def brute_count(system):
    arguments = (system.positions, system.cell, system.pbc, harness.CUTOFF, system.system_idx)
    return diffnl.reference.neighbor_pairs(*arguments).mapping.shape[1]


@pytest.mark.filterwarnings("ignore")  # what peers warn about on import is theirs
@pytest.mark.parametrize("size", ["64", "3x27"])
@pytest.mark.parametrize("name", CPU_LIBRARIES)
def test_every_library_finds_the_pairs_of_the_oracle(name, size):
    system = harness.make_system(size, torch.float64)
    reason = peers.LIBRARIES[name].refusal(system)
    if reason:
        assert reason == "no batches" and "x" in size
        return
    runs, _, missing = peers.load([name])
    if missing:
        pytest.skip(missing[name])
    for run in runs[name].values():
        mapping, shifts, vectors = run(*system.leaves(), system, True)
        assert mapping.shape[1] == brute_count(system) > 0
        assert shifts.shape == vectors.shape == (mapping.shape[1], 3)
        assert 0 < vectors.norm(dim=1).max() < harness.CUTOFF


@pytest.mark.parametrize("gather", list(peers.GATHERS))
@pytest.mark.parametrize("size", ["64", "3x27"])
def test_plain_vectors_are_the_vectors_of_the_list(gather, size):
    system = harness.make_system(size, torch.float64)
    pairs = diffnl.neighbor_pairs(
        system.positions, system.cell, system.pbc, harness.CUTOFF, system.system_idx
    )
    vectors = peers.plain_vectors(
        peers.GATHERS[gather],
        system.positions,
        system.cell,
        pairs.mapping,
        pairs.shifts,
        system.system_idx,
    )
    torch.testing.assert_close(vectors, pairs.vectors)


def test_same_size_and_seed_give_the_same_system():
    first, second, other = (harness.make_system("3x27", torch.float32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.positions, second.positions) and torch.equal(first.cell, second.cell)
    assert not torch.equal(first.positions, other.positions)
    assert first.label == "batch-3x27" and first.atoms == 81 and first.systems == 3
    with pytest.raises(ValueError, match="cube .* got 65; the nearest is 64"):
        harness.make_system("65", torch.float32)


def test_a_changing_box_is_one_of_another_density_at_each_call():
    """Nothing that a library learns from a call holds in the next: the number of pairs jumps either way."""
    system = harness.make_system("~64", torch.float64)
    assert system.label == "changing-64" and len(system.parts) == len(harness.CHANGING)
    counts = [brute_count(part) for part in system.parts]
    assert counts[0] == min(counts) and counts[1] == max(counts) > 3 * counts[0] and counts[2] < counts[3]
    calls = []

    def run(positions, cell, part, with_vectors):
        calls.append(part)
        return torch.zeros(2, 0), None, positions[:0] + cell[:0]

    assert peers.LIBRARIES["nvalchemi"].view(system).parts[1].cell.shape == (1, 3, 3)
    for step, prepare in peers.STEPS.items():
        call = prepare(run, system)
        calls.clear()
        call()
        assert [part.cell[0, 0] for part in calls] == [
            part.cell[0, 0] for part in system.parts if step != "backward"
        ]


def test_the_bound_of_neighbours_is_tight_and_suffices():
    for size in ("10648", "8x125", "~1000"):
        for part in harness.make_system(size, torch.float32).parts:
            pairs = diffnl.neighbor_pairs(
                part.positions, part.cell, part.pbc, harness.CUTOFF, part.system_idx
            )
            most = int(pairs.mapping[0].bincount().max())
            assert most <= peers.MAX_NEIGHBORS
        if "~" not in size:
            assert peers.MAX_NEIGHBORS < 1.2 * most


def test_a_peer_with_plain_vectors_gets_its_better_way_in_each_step(tmp_path, monkeypatch, capsys):
    """The row has the least time, says whose it is, and keeps both; of a changing box times are a list's."""
    monkeypatch.setitem(peers.LIBRARIES, "plain", peers.Library(peers._diffnl, "plain", plain=True))
    milliseconds = {
        "list": {"diffnl/own": 8.0, "plain/index_select": 16.0},
        "vectors": {"diffnl/own": 8.0, "plain/index_select": 20.0, "plain/indexing": 30.0},
        "backward": {"diffnl/own": 8.0, "plain/index_select": 40.0, "plain/indexing": 10.0},
        "train": {"diffnl/own": 8.0, "plain/index_select": 24.0, "plain/indexing": 48.0},
    }
    steps = iter(2 * list(peers.STEPS))

    def clock(calls, device, budget):
        times = milliseconds[next(steps)]
        assert list(calls) == list(times)
        return {entry: [time / 1e3] for entry, time in times.items()}, {}

    monkeypatch.setattr(neighbors, "time_in_turns", clock)
    _, record = run_neighbors(tmp_path, "--sizes", "27,~27", "--peers", "plain")
    own, plain, _, changing = record["rows"]
    assert [plain[f"{step}_ms"] for step in peers.STEPS] == pytest.approx([16.0, 20.0, 10.0, 24.0])
    assert plain["train_ways"] == pytest.approx({"index_select": 24.0, "indexing": 48.0})
    ways = [tables.fastest_way(plain, step) for step in ("vectors", "backward", "train")]
    assert ways == ["index_select", "indexing", "index_select"]
    assert changing["system"] == "changing-27" and changing["list_ms"] == pytest.approx(16.0 / 4)
    assert own["train_ways"] == pytest.approx({peers.OWN: 8.0}) and tables.chosen_ways(own) is None
    words = (
        "plain: vectors by index_select (indexing: 1.50x), backward by indexing (index_select: 4.00x), train"
    )
    assert words in capsys.readouterr().out


def test_json_holds_a_row_for_each_system_and_library(tmp_path, capsys):
    status, record = run_neighbors(tmp_path, "--sizes", "27,64", "--batches", "3x27", "--peers", "")
    assert status == 0
    assert [row["system"] for row in record["rows"]] == ["bulk-27", "bulk-64", "batch-3x27"]
    for row in record["rows"]:
        assert row["library"] == "diffnl" and row["note"] is None and row["pairs"] > 0
        assert all(row[f"{step}_ms"] > 0 and row[f"{step}_repeats"] >= 3 for step in peers.STEPS)
    assert record["machine"]["threads"] == 1 and record["machine"]["torch"] == torch.__version__
    assert "bulk-64: 64 atoms" in capsys.readouterr().out


def test_a_peer_that_loses_pairs_is_refused(tmp_path, monkeypatch, capsys):
    def make_lossy(gather):
        run = peers.LIBRARIES["diffnl"].make(gather)

        def lossy(*arguments):
            return tuple(part[..., 2:] if k == 0 else part[2:] for k, part in enumerate(run(*arguments)))

        return lossy

    honest = replace(peers.LIBRARIES["diffnl"], distribution="honest")
    monkeypatch.setitem(peers.LIBRARIES, "honest", honest)
    monkeypatch.setitem(peers.LIBRARIES, "lossy", peers.Library(make_lossy, "lossy", batches=True))
    options = ["--dtype", "float64", "--sizes", "64", "--peers", "lossy,honest"]
    status, record = run_neighbors(tmp_path, *options)
    rows = {row["library"]: row for row in record["rows"]}
    assert status == 0 and rows["diffnl"]["note"] is None
    assert rows["lossy"]["pairs"] == rows["diffnl"]["pairs"] - 2
    assert rows["lossy"]["note"].startswith("refused: ") and rows["lossy"]["vectors_ms"] is None
    assert {record["best_peer_over_diffnl"][0][f"{step}_ms"]["peer"] for step in peers.STEPS} == {"honest"}
    assert "lossy: refused: " in capsys.readouterr().out


def test_a_missing_peer_is_reported(tmp_path, monkeypatch, capsys):
    def absent(gather):
        raise ImportError("no such library")

    monkeypatch.setitem(peers.LIBRARIES, "absent", peers.Library(absent, "absent"))
    _, record = run_neighbors(tmp_path, "--sizes", "27", "--peers", "absent")
    assert record["missing"] == {"absent": "ImportError: no such library"}
    assert "missing: absent (ImportError: no such library)" in capsys.readouterr().out


def test_an_unknown_peer_is_an_error(capsys):
    with pytest.raises(SystemExit):
        neighbors.main(["--peers", "nobody"])
    assert "got nobody" in capsys.readouterr().err


def test_counts_may_differ_by_float32_rounding_only():
    single, double = (harness.make_system("1000", dtype) for dtype in (torch.float32, torch.float64))
    allowed = neighbors.rounding_tolerance(single, 88_000)
    assert 2 <= allowed < 1e-4 * 88_000 and allowed % 2 == 0
    assert neighbors.rounding_tolerance(double, 88_000) == 0
    counts = {"diffnl": 88_000, "a": 88_000 + allowed, "b": 88_000 - allowed - 2}
    assert neighbors.judge_counts(counts, single)[0] == 88_000
    assert list(neighbors.judge_counts(counts, single)[1]) == ["b"]
    # diffnl is refused like any other when the others agree against it
    expected, refused = neighbors.judge_counts({"diffnl": 87_998, "a": 88_000, "b": 88_000}, double)
    assert expected == 88_000 and list(refused) == ["diffnl"]


def test_ratios_are_the_best_peer_over_diffnl():
    columns = dict.fromkeys(tables.COLUMNS)
    rows = [
        columns | {"system": "s", "library": name, "pairs": 1, "list_ms": ms, "train_mb": mb}
        for name, ms, mb in [("diffnl", 2.0, 0.1), ("a", 8.0, None), ("b", 6.0, 4.0)]
    ]
    ratios = tables.compare(rows)
    assert ratios["list_ms"] == {"ratio": 3.0, "peer": "b", "at_least": False}
    assert ratios["train_mb"] == {"ratio": 4.0 / harness.RESOLUTION_MB, "peer": "b", "at_least": True}
    assert ratios["vectors_ms"] is None and tables.compare(rows[1:]) is None


def test_a_failing_entry_does_not_stop_the_others():
    def prepare():
        raise RuntimeError("broken")

    times, errors = harness.time_in_turns({"a": prepare, "b": lambda: lambda: None}, "cpu", budget=0.001)
    assert errors == {"a": "RuntimeError: broken"}
    assert list(times) == ["b"] and len(times["b"]) >= 3


# The kernel counts resident pages, of 4 kB, per core and in batches (percpu_counter_batch).
CORES = os.cpu_count() or 1
MEMORY_NOISE_MB = CORES * max(32, 2 * CORES) * 4096 / harness.MEGABYTE


def test_peak_memory_sees_what_was_freed_again():
    size = max(64, 16 * math.ceil(MEMORY_NOISE_MB))
    growth = harness.peak_growth_mb(lambda: torch.ones(size * harness.MEGABYTE // 4).sum(), "cpu")
    if growth is None:
        pytest.skip("the kernel does not reset the high-water mark")
    assert 60 / 64 < growth / size < 80 / 64  # of float32, gone when the call returns


def test_peak_memory_of_a_step_in_a_fresh_process():
    settings = {"dtype": torch.float32, "device": "cpu", "seed": 0, "threads": 1}
    peaks = peers.peak_memory("diffnl", {"vectors": peers.OWN}, "1000", **settings)
    if peaks["vectors"] is None:
        pytest.skip("the kernel does not reset the high-water mark")
    system = harness.make_system("1000", torch.float32)
    pairs = diffnl.neighbor_pairs(system.positions, system.cell, system.pbc, harness.CUTOFF)
    written = sum(part.nbytes for part in pairs) / harness.MEGABYTE
    assert written - max(harness.RESOLUTION_MB, MEMORY_NOISE_MB) < peaks["vectors"] < 10 * written


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"system": f"bulk-{atoms}", "atoms": atoms, "library": name}
        | dict.fromkeys(tables.COLUMNS, atoms / 10)
        for name in ("diffnl", "vesin")
        for atoms in (64, 1000)
    ]
    tables.plot(rows, "title", tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_scaling_is_relative_to_the_size_nearest_ten_thousand(tmp_path):
    path = tmp_path / "scaling.json"
    arguments = ["--sizes", "27,64", "--threads", "2,1", "--budget", "0.001", "--no-memory"]
    assert scaling.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["atoms"], row["step"], row["threads"]) for row in rows} == {
        (atoms, step, threads) for atoms in (27, 64) for step in scaling.TIMED for threads in (1, 2)
    }
    assert all(row["ratio_to_reference"] == 1 for row in rows if row["atoms"] == 64)
    assert all(row["speedup"] == 1 for row in rows if row["threads"] == 1)
    assert all(row["ns_per_pair"] == pytest.approx(row["ms"] * 1e6 / row["pairs"]) for row in rows)


# What a GPU adds.


def test_a_gpu_run_has_its_own_rows():
    options = neighbors.parse(["--device", "cuda"])
    boxes = ["1000", "10648", "97336", "1000000", "~1000", "~10648"]
    assert options.systems == [*boxes, "512x27", "512x64", "32x1000"]
    assert {"nvalchemi", "nvalchemi-cell", "nvalchemi-tile", "vesin", "vesin-torch"} <= set(options.peers)
    assert options.extras and options.large
    assert not neighbors.parse(["--device", "cuda", "--dtype", "float64"]).large
    assert not neighbors.parse([]).extras
    assert "vesin" not in neighbors.parse(["--without", "vesin"]).peers


def test_libraries_get_a_batch_in_the_form_they_want():
    batch = harness.make_system("3x27", torch.float32)
    assert batch.batch_ptr.tolist() == [0, 27, 54, 81] and batch.batch_ptr.dtype == torch.int32
    assert torch.equal(batch.batch_idx.long(), batch.system_idx) and batch.batch_idx.dtype == torch.int32
    box = harness.make_system("27", torch.float32)
    view = peers.LIBRARIES["nvalchemi"].view(box)
    assert view.cell.shape == (1, 3, 3) and view.pbc.shape == (1, 3) and view.positions is box.positions
    assert peers.LIBRARIES["vesin"].view(box) is box
    expected = diffnl.neighbor_pairs(box.positions, box.cell, box.pbc, harness.CUTOFF)
    arguments = (view.positions, view.cell, expected.mapping, expected.shifts, None)
    torch.testing.assert_close(peers.plain_vectors(peers.GATHERS["indexing"], *arguments), expected.vectors)


def test_the_json_grows_by_rows_and_a_run_resumes_from_it(tmp_path):
    _, first = run_neighbors(tmp_path, "--sizes", "27", "--peers", "")
    _, both = run_neighbors(tmp_path, "--sizes", "27,64", "--peers", "", "--resume")
    assert both["rows"][0] == first["rows"][0]
    assert [row["system"] for row in both["rows"]] == ["bulk-27", "bulk-64"]
    with pytest.raises(ValueError, match="has other settings"):
        run_neighbors(tmp_path, "--sizes", "27", "--peers", "", "--resume", "--dtype", "float64")


def test_a_peer_that_takes_the_gpu_along_ends_the_run_with_its_rows_kept(tmp_path, monkeypatch, capsys):
    def make_broken(gather):
        run = peers.LIBRARIES["diffnl"].make(gather)

        def broken(positions, cell, system, with_vectors):
            if system.atoms > 27:
                raise RuntimeError("an illegal memory access")
            return run(positions, cell, system, with_vectors)

        return broken

    def lost(name, error, device):
        raise harness.DeviceLost(name, harness.describe(error))

    monkeypatch.setitem(peers.LIBRARIES, "broken", peers.Library(make_broken, "broken"))
    monkeypatch.setattr(neighbors, "survive", lost)
    status, record = run_neighbors(tmp_path, "--sizes", "27,64", "--peers", "broken")
    assert status == neighbors.LOST == cuda_run.DEVICE_LOST
    assert record["lost_to"] == ["broken"]
    assert {row["system"] for row in record["rows"]} == {"bulk-27"}
    arguments = ["--sizes", "27,64", "--peers", "broken", "--without", "broken", "--resume"]
    status, record = run_neighbors(tmp_path, *arguments)
    assert status == 0 and record["rows"][-1]["system"] == "bulk-64"


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


# The run on a CUDA machine.


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
