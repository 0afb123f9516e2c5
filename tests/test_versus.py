"""Two versions of diffnl against each other: turns, ratios with their noise, and the verdict."""

import sys
from pathlib import Path

import pytest

import diffnl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import versus  # noqa: E402
from peers import STEPS  # noqa: E402


class Scripted:
    """In place of a process: its times are 1 ms but for what is given; and a log of the turns."""

    log: list = []
    train_ms, two_threads_ms = 1.0, 1.0

    def __init__(self, folder):
        self.name = folder.name

    def check(self):
        pass

    def ask(self, **order):
        if "row" in order:
            self.row = order["row"]
            return None
        self.log.append((self.name, self.row, order["threads"]))
        if self.row[0] == versus.SMALL:
            return 1e-3 * (self.two_threads_ms if order["threads"] == 2 else 1.0)
        slower = self.name == "new" and self.row[2] == "train"
        return 1e-3 * (self.train_ms if slower else 1.0)

    def stop(self):
        self.log.append((self.name, None, None))


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(Scripted, "log", [])
    monkeypatch.setattr(versus, "Version", Scripted)
    return Scripted


RUN = ["--base", "base", "--new", "new", "--sizes", "27,~27", "--launches", "2", "--rounds", "3"]


def test_the_same_twice_is_no_loss(scripted, capsys):
    assert versus.main(RUN) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("  bulk-27 ", "  changing-27 "))]
    # Three kinds of list in each step, one in the search alone; of the changing box the plain list.
    assert len(rows) == 3 * len(STEPS) + 1 + len(STEPS)
    assert all(row[-2:] == ["1.000", "0.000"] for row in rows)
    assert lines[-1] == "list of 60 atoms, two threads over one: 1.000 +- 0.000"


def test_versions_take_turns_in_either_order(scripted):
    versus.main([*RUN, "--kinds", "plain"])
    turns = [name for name, row, _ in scripted.log if row == ("27", "plain", "list")]
    assert turns == 2 * ["base", "new", "new", "base", "base", "new"]
    assert [name for name, row, _ in scripted.log if row is None] == 2 * ["base", "new"]
    threads = [count for _, row, count in scripted.log if row == (versus.SMALL, "plain", "list")]
    assert threads[:4] == [2, 1, 1, 2] and len(threads) == 2 * 2 * 9


def test_a_row_below_the_limit_is_measured_again_and_fails(scripted, monkeypatch, capsys):
    monkeypatch.setattr(scripted, "train_ms", 1.04)
    assert versus.main([*RUN, "--kinds", "plain"]) == 1
    assert "slower: bulk-27, plain, train: 0.962 < 0.97" in capsys.readouterr().out
    times = {step: sum(row == ("27", "plain", step) for _, row, _ in scripted.log) for step in STEPS}
    assert times["train"] == 2 * times["list"] == 2 * 2 * 2 * 3
    monkeypatch.setattr(scripted, "train_ms", 1.02)
    assert versus.main([*RUN, "--kinds", "plain"]) == 0


def test_small_lists_on_two_threads_have_a_limit(scripted, monkeypatch, capsys):
    monkeypatch.setattr(scripted, "two_threads_ms", 1.2)
    assert versus.main([*RUN, "--kinds", "plain"]) == 1
    assert "two threads over one: 1.200 +- 0.000, slower than 1.1" in capsys.readouterr().out
    assert versus.main([*RUN, "--kinds", "plain", "--threads", "1"]) == 0  # nothing to compare


def test_noise_is_two_standard_errors_of_the_median():
    """Deviations from the median 1.0 are 0, 0.1, 0.1, 0.2, 0.2: their median is 0.1."""
    row = versus.Row(("27", "plain", "list"), base=[0.8, 0.9, 1.0, 1.1, 1.2], new=[1.0] * 5)
    assert row.ratio == pytest.approx(1.0)
    assert row.noise == pytest.approx(2 * 1.2533 * 1.4826 * 0.1 / 5**0.5)


def test_two_processes_of_this_version(capsys):
    """A row has times of both. Which is faster decides the status and is not looked at."""
    folder = str(Path(diffnl.__file__).parents[1])  # of an installed diffnl too
    run = ["--base", folder, "--new", folder, "--sizes", "~8", "--threads", "1"]
    assert versus.main([*run, "--launches", "1", "--rounds", "1", "--budget", "0"]) in (0, 1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "changing-8  plain" in line]
    assert {row[2] for row in rows} == set(STEPS)
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)


@pytest.mark.parametrize("kind", list(versus.KINDS))
def test_every_kind_of_list_can_be_timed(kind):
    for step in versus.KINDS[kind]:
        assert versus.sample(versus.prepare("8", kind, step, "float32", "cpu"), "cpu", 0.0, 1, True) > 0


def test_a_folder_without_diffnl_is_refused(tmp_path):
    (tmp_path / "diffnl").mkdir()
    (tmp_path / "diffnl" / "__init__.py").write_text("__file__ = '/elsewhere/diffnl/__init__.py'\n")
    version = versus.Version(tmp_path)
    with pytest.raises(ValueError, match="diffnl comes from /elsewhere.*, not from "):
        version.check()
    version.stop()
    with pytest.raises(SystemExit):
        versus.main([*RUN, "--kinds", "fast"])
