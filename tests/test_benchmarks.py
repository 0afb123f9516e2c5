"""The benchmarks: same pairs for all libraries, refusals and gaps in the open, rows in the JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import harness  # noqa: E402
import neighbors  # noqa: E402
import peers  # noqa: E402
import scaling  # noqa: E402

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
    runs, _, missing = peers.load([name], "index_select")
    if missing:
        pytest.skip(missing[name])
    mapping, shifts, vectors = runs[name](*system.leaves(), system, True)
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
    columns = dict.fromkeys(neighbors.COLUMNS)
    rows = [
        columns | {"system": "s", "library": name, "pairs": 1, "list_ms": ms, "train_mb": mb}
        for name, ms, mb in [("diffnl", 2.0, 0.1), ("a", 8.0, None), ("b", 6.0, 4.0)]
    ]
    ratios = neighbors.compare(rows)
    assert ratios["list_ms"] == {"ratio": 3.0, "peer": "b", "at_least": False}
    assert ratios["train_mb"] == {"ratio": 4.0 / harness.RESOLUTION_MB, "peer": "b", "at_least": True}
    assert ratios["vectors_ms"] is None and neighbors.compare(rows[1:]) is None


def test_a_failing_entry_does_not_stop_the_others():
    def prepare():
        raise RuntimeError("broken")

    times, errors = harness.time_in_turns({"a": prepare, "b": lambda: lambda: None}, "cpu", budget=0.001)
    assert errors == {"a": "RuntimeError: broken"}
    assert list(times) == ["b"] and len(times["b"]) >= 3


def test_peak_memory_sees_what_was_freed_again():
    growth = harness.peak_growth_mb(lambda: torch.ones(2**24).sum(), "cpu")
    if growth is None:
        pytest.skip("the kernel does not reset the high-water mark")
    assert 60 < growth < 80  # 64 MB of float32, gone when the call returns


def test_peak_memory_of_a_step_in_a_fresh_process():
    settings = {"dtype": torch.float32, "device": "cpu", "gather": "index_select", "seed": 0, "threads": 1}
    peaks = peers.peak_memory("diffnl", ["vectors"], "1000", **settings)
    if peaks["vectors"] is None:
        pytest.skip("the kernel does not reset the high-water mark")
    system = harness.make_system("1000", torch.float32)
    pairs = diffnl.neighbor_pairs(system.positions, system.cell, system.pbc, harness.CUTOFF)
    written = sum(part.nbytes for part in pairs) / harness.MEGABYTE
    assert written - harness.RESOLUTION_MB < peaks["vectors"] < 10 * written


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"system": f"bulk-{atoms}", "atoms": atoms, "library": name}
        | dict.fromkeys(neighbors.COLUMNS, atoms / 10)
        for name in ("diffnl", "vesin")
        for atoms in (64, 1000)
    ]
    neighbors.plot(rows, "title", tmp_path / "times.png")
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
