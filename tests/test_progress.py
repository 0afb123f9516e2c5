"""What the examples say while they run: lines without a terminal, what remains, how to go on."""

import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("ase")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_mlip  # noqa: E402
from mlip import progress  # noqa: E402
from mlip.training import Trainer  # noqa: E402
from test_train_mlip import SMALL, files  # noqa: E402, F401


class Clock:
    """Says what it is set to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_line_says_what_remains():
    clock = Clock()
    counter = progress.Counter("training", 800, 200, clock=clock)
    assert counter.line() == "training: step 200 of 800, 0 s so far"
    clock.now = 90.0
    counter.update()
    counter.update(119)
    # 120 steps took 90 s, so 480 take 360 s; those that were done before took no time here.
    assert counter.line() == "training: step 320 of 800, 1 min 30 s so far, about 6 min 0 s to go"
    assert progress.Counter("plots", None, clock=clock).line() == "plots: 0 s so far"


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "59 s"), (60, "1 min 0 s"), (7265, "2 h 1 min")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_a_line_at_least_every_half_minute_however_long_a_step_takes(capsys):
    """The thread waits half a minute between lines and asks no step for leave."""
    clock, waits = Clock(), []
    counter = progress.Counter("training", 10, clock=clock)

    def wait(seconds):
        waits.append(seconds)
        clock.now += seconds
        return len(waits) > 3

    progress.speak(counter, wait)
    assert max(waits) <= 30
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"training: step 0 of 10, {text} so far" for text in ("30 s", "1 min 0 s", "1 min 30 s")]


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.001)
    with progress.watch("loop", 2) as update:
        while "loop: step 0 of 2" not in capsys.readouterr().out:
            pass
        update()
        while "loop: step 1 of 2" not in capsys.readouterr().out:
            pass
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.track("ab", "letters", "letter")) == ["a", "b"]
    out, bar = capsys.readouterr()
    assert "letters" in bar and "letters" not in out


def test_training_without_a_terminal_tells_what_remains(files, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(progress, "SECONDS", 0.001)
    assert train_mlip.main([*files, *SMALL, "--epochs", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("training: step ") and line.endswith(" to go") for line in lines)
    assert any(line.startswith("test, plots and a relaxation: ") for line in lines)
    header = next(k for k, line in enumerate(lines) if line.split() == ["train", "MAE", "validation", "MAE"])
    assert lines[header + 1].split() == 2 * ["energy", "forces", "stress", "stress"]


def test_the_test_table_names_its_rows(files, tmp_path, capsys):  # noqa: F811
    assert train_mlip.main([*files, *SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("test "))
    names = [line.split()[:2] for line in lines[start + 1 : start + 5]]
    assert names == [["energy", "eV/atom"], ["forces", "eV/Å"], ["stress", "eV/Å³"], ["stress", "GPa"]]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--epochs", "4"], ["--epochs", "4"]),
        (["--resume", "--stop-after", "3", "--out", "a b"], ["--out", "a b"]),
        (["--stop=3", "--stress-order", "detect"], ["--stress-order", "detect"]),
    ],
)
def test_the_command_to_resume(arguments, kept):
    script = train_mlip.__file__
    alone = shlex.split(train_mlip.command_to_resume(arguments, 1))
    assert alone == [sys.executable, script, *kept, "--resume"]
    both = shlex.split(train_mlip.command_to_resume(arguments, 2))
    assert both == ["torchrun", "--nproc-per-node", "2", script, *kept, "--resume"]


def test_ctrl_c_says_how_to_go_on(files, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The command that is printed ends the run; without a checkpoint there is none to print."""
    whole = Trainer.train_epoch

    def interrupted(trainer, on_step):
        if trainer.epoch == stop_in:
            raise KeyboardInterrupt
        return whole(trainer, on_step)

    run = [*files, *SMALL, "--epochs", "3", "--every", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        stop_in = 0
        assert train_mlip.main(run) == train_mlip.INTERRUPTED == 130
        assert "there is no checkpoint yet" in capsys.readouterr().err
        stop_in = 2
        assert train_mlip.main(run) == 130
    said = capsys.readouterr().err
    assert str(tmp_path / "checkpoint.pt") in said
    python, script, *arguments = shlex.split(said.splitlines()[-1])
    assert (python, script) == (sys.executable, train_mlip.__file__)
    assert train_mlip.main(arguments) == 0
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3 and (tmp_path / "potential.pt").exists()
