"""The benchmarks: same pairs for all libraries, refusals and gaps in the open, rows in the JSON."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import run_neighbors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cuda_run  # noqa: E402
import harness  # noqa: E402
import neighbors  # noqa: E402
import peers  # noqa: E402
import scaling  # noqa: E402
import tables  # noqa: E402

import diffnl  # noqa: E402

pytestmark = pytest.mark.usefixtures("threads")  # the benchmarks set torch's
CPU_LIBRARIES = [name for name, library in peers.LIBRARIES.items() if "cpu" in library.devices]


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
