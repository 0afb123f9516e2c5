"""The training example: the files it refuses, learning, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("ase")
import ase  # noqa: E402
import ase.build  # noqa: E402
import ase.io  # noqa: E402
from ase.calculators.emt import EMT  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import processes  # noqa: E402
import train_mlip  # noqa: E402
from alloys import CPU, labelled  # noqa: E402
from mlip.calculator import PotentialCalculator, build_potential  # noqa: E402
from mlip.data import atoms_from_frame, collate, frame_from_atoms, make_copper, read_frames  # noqa: E402
from mlip.model import ModelConfig  # noqa: E402
from mlip.training import Scales, Settings, Trainer, errors, fit_config, predict  # noqa: E402

SMALL = [
    "--channels",
    "4",
    "--cutoff",
    "4.0",
    "--batch-size",
    "4",
    "--learning-rate",
    "0.02",
    "--relax-steps",
    "10",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training and a test file of small copper cells."""
    folder = tmp_path_factory.mktemp("copper")
    frames = [frame for frame in make_copper(28, seed=1) if len(frame.numbers) <= 8]
    train, test = folder / "train.extxyz", folder / "test.extxyz"
    ase.io.write(train, [atoms_from_frame(frame) for frame in frames[:11]])
    ase.io.write(test, [atoms_from_frame(frame) for frame in frames[11:]])
    return ["--train", str(train), "--test", str(test)]


# The data.


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"stress": np.full(6, np.nan)}, r"bad\.extxyz: frame 1: its stress is not finite"),
        ({"forces": None}, r"bad\.extxyz: frame 1 has no forces: .* this frame has energy, stress"),
        ({"energy": None}, r"bad\.extxyz: frame 1 has no energy"),
        ({"energy": np.nan}, r"bad\.extxyz: frame 1: its energy is not finite"),
    ],
)
def test_unusable_label(tmp_path, capsys, labels, message):
    good, bad = (
        labelled(ase.build.bulk("Cu", cubic=True)),
        labelled(ase.build.bulk("Cu", cubic=True), **labels),
    )
    ase.io.write(tmp_path / "bad.extxyz", [good, bad])
    with pytest.raises(ValueError, match=message):
        read_frames(tmp_path / "bad.extxyz")
    assert train_mlip.main(["--train", str(tmp_path / "bad.extxyz"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'bad.extxyz'}: frame 1")


def test_unusable_file(tmp_path):
    with pytest.raises(ValueError, match="ASE cannot read it"):
        read_frames(tmp_path / "absent.extxyz")
    molecule = labelled(ase.Atoms("Cu2", positions=[[0, 0, 0], [2.2, 0, 0]]), stress=None)
    ase.io.write(tmp_path / "open.extxyz", [molecule, molecule])
    with pytest.raises(ValueError, match="no training frame has a stress"):
        fit_config(read_frames(tmp_path / "open.extxyz"), ModelConfig(species=()))
    flat = labelled(ase.Atoms("Cu", cell=[2.5, 2.5, 0.0], pbc=True))
    with pytest.raises(ValueError, match="flat is periodic along a cell vector that is zero"):
        frame_from_atoms(flat, "flat")


def mixed_images(count):
    """Crystals (every third without a stress), slabs with vacuum, slabs of two vectors, molecules in a box
    and without one, with EMT's labels, in turn."""
    random = np.random.default_rng(7)
    images = []
    for index in range(count):
        kind = index % 5
        if kind in (0, 1):
            atoms = ase.build.bulk("Cu", cubic=True)
        elif kind in (2, 3):
            atoms = ase.build.fcc111("Cu", (1, 1, 3), vacuum=6.0 if kind == 2 else None)
        else:
            atoms = ase.Atoms("Cu3", positions=[[0, 0, 0], [2.4, 0, 0], [0.4, 2.3, 0.3]])
            if index % 2:
                atoms.set_cell([9.0, 9.0, 9.0])
        atoms.info.clear()  # ASE's notes on the slab, which extxyz cannot hold
        atoms.positions += random.normal(0.0, 0.08, (len(atoms), 3))
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": None}
        if kind == 2 or (kind < 2 and index % 3):
            labels["stress"] = atoms.get_stress()
        images.append(labelled(atoms, **labels))
    return images


@pytest.fixture(scope="module")
def mixed_files(tmp_path_factory):
    """A training file of every kind of structure, and a test file of molecules alone."""
    folder = tmp_path_factory.mktemp("mixed")
    images = mixed_images(20)
    ase.io.write(folder / "train.extxyz", images)
    ase.io.write(folder / "test.extxyz", [atoms for atoms in images if not atoms.pbc.any()])
    return ["--train", str(folder / "train.extxyz"), "--test", str(folder / "test.extxyz")]


def test_a_file_that_mixes_crystals_slabs_and_molecules(mixed_files, tmp_path, capsys):
    """Which frames have a stress, and two epochs of the whole script: every number is finite."""
    frames = read_frames(mixed_files[1])
    assert [frame.has_stress for frame in frames[:5]] == [False, True, True, False, False]
    ranks = [int(torch.linalg.matrix_rank(frame.cell)) for frame in frames[:10]]
    assert ranks == [3, 3, 3, 2, 0, 3, 3, 3, 2, 3]  # cells are the file's
    run = [*mixed_files, *SMALL, "--epochs", "2", "--every", "1", "--valid-fraction", "0.3"]
    assert train_mlip.main([*run, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "training structures have no stress" in output and "no labels" in output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        for which in ("train", "validation"):
            assert all(value is not None and np.isfinite(value) for value in row[which].values())
    weights = torch.load(tmp_path / "potential.pt", weights_only=True)["weights"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_open_boundary_frames_count_for_energy_and_forces_only(tmp_path):
    molecule = labelled(ase.Atoms("Cu2", positions=[[0, 0, 0], [2.2, 0, 0]]), stress=None)
    crystal = labelled(ase.build.bulk("Cu", cubic=True), stress=np.full(6, 0.01))
    ase.io.write(tmp_path / "mixed.extxyz", [molecule, crystal])
    frames = read_frames(tmp_path / "mixed.extxyz")
    assert [frame.has_stress for frame in frames] == [False, True]
    config, scales = fit_config(frames, ModelConfig(species=(), cutoff=4.0, channels=4))
    trainer = Trainer(
        build_potential(config, CPU, torch.float32), scales, settings(), frames, CPU, torch.float32
    )
    batch = collate(frames, CPU, torch.float32)
    assert errors(predict(trainer.model, batch, create_graph=False), batch)["stress"].shape == (1, 3, 3)
    for group in (frames, frames[:1]):
        assert torch.isfinite(trainer.train_step(group)["loss"])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def settings(**changes):
    values = {"epochs": 2, "seed": 0, "batch_size": 4, "learning_rate": 0.01}
    weights = {"energy_weight": 1.0, "force_weight": 1.0, "stress_weight": 1.0}
    return Settings(**{**values, **weights, **changes})


def test_reference_energies_come_from_the_composition():
    frames = []
    for formula in ("Ni", "Cu", "NiCu", "NiCu2"):
        atoms = ase.Atoms(
            formula,
            positions=2.5 * np.arange(len(ase.Atoms(formula)))[:, None] * [1, 0, 0],
            cell=[9] * 3,
            pbc=True,
        )
        energy = -3.0 * (atoms.numbers == 28).sum() + 2.0 * (atoms.numbers == 29).sum()
        frames.append(frame_from_atoms(labelled(atoms, energy=energy), formula))
    config, scales = fit_config(frames, ModelConfig(species=()))
    assert config.species == (28, 29)
    assert config.reference_energies == pytest.approx((-3.0, 2.0))
    assert scales == Scales(energy=1e-3, forces=1e-2, stress=1e-4)  # the floors: every label is explained


# The whole run.


def test_learns_and_writes(files, tmp_path, capsys):
    assert train_mlip.main([*files, *SMALL, "--epochs", "12", "--every", "1", "--out", str(tmp_path)]) == 0
    history = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]["history"]
    assert [row["epoch"] for row in history] == list(range(1, 13))
    assert history[-1]["train"]["loss"] < 0.4 * history[0]["train"]["loss"]
    for key in ("energy", "forces", "stress"):
        assert history[-1]["validation"][key] < history[0]["validation"][key]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history
    for plot in ("parity.png", "learning_curve.png"):
        assert (tmp_path / plot).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    output = capsys.readouterr().out
    for text in ("eV/atom", "eV/Å ", "eV/Å³", "GPa", "predicting the mean", "pressure (GPa)"):
        assert text in output
    atoms = ase.io.read(files[3])
    atoms.calc = PotentialCalculator(tmp_path / "potential.pt")
    assert atoms.get_stress().shape == (6,)


# e3nn's and matplotlib's own; what the example does with them is under test elsewhere.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["copper", "mixed"])
def test_runs_on_a_gpu_as_on_the_cpu(kind, files, mixed_files, tmp_path, gpu):
    """One epoch on each, captured on the GPU: the same loss but for rounding, and a potential for either."""
    losses = {}
    files = {"copper": files, "mixed": [*mixed_files, "--valid-fraction", "0.3"]}[kind]
    try:
        for device in ("cpu", "cuda"):
            out = tmp_path / device
            run = [*files, *SMALL, "--epochs", "1", "--device", device, "--out", str(out)]
            assert train_mlip.main(run) == 0
            checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            (row,) = checkpoint["trainer"]["history"]
            losses[device] = [row["train"]["loss"], *row["validation"].values()]
    finally:
        torch.use_deterministic_algorithms(False)  # which the example asks for on a GPU
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-2)
    atoms = ase.io.read(files[3])
    energies = []
    for device in ("cpu", "cuda"):
        atoms.calc = PotentialCalculator(tmp_path / "cuda" / "potential.pt", device, torch.float64)
        energies.append(atoms.get_potential_energy())
    assert energies[1] == pytest.approx(energies[0], abs=1e-8)


def test_resumes_to_the_same_bits(files, tmp_path, capsys):
    run = [*files, *SMALL, "--epochs", "4", "--every", "1", "--out"]
    assert train_mlip.main([*run, str(tmp_path / "whole")]) == 0
    assert train_mlip.main([*run, str(tmp_path / "parts"), "--stop-after", "1"]) == 0
    assert not (tmp_path / "parts" / "potential.pt").exists()
    assert train_mlip.main([*run, str(tmp_path / "parts"), "--resume", "--stop-after", "3"]) == 0
    assert train_mlip.main([*run, str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["trainer"]["history"] == parts["trainer"]["history"]
    for state in ("model", "averaged"):
        for name, value in whole["trainer"][state].items():
            assert torch.equal(value, parts["trainer"][state][name]), name
    potentials = [
        torch.load(tmp_path / name / "potential.pt", weights_only=True) for name in ("whole", "parts")
    ]
    assert potentials[0]["config"] == potentials[1]["config"]

    capsys.readouterr()
    elsewhere = [*run, str(tmp_path / "parts"), "--resume"]
    assert train_mlip.main([*elsewhere, "--seed", "7"]) == 2
    assert "was made with --seed 0, not 7" in capsys.readouterr().err
    assert train_mlip.main([*files[:2], *elsewhere[2 + len(files[:2]) :]]) == 2
    assert "other training, validation or test frames" in capsys.readouterr().err
    assert train_mlip.main([*run, str(tmp_path / "none"), "--resume"]) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_killed_run_ends_as_one_that_was_not(files, tmp_path):
    """kill -9 in the middle of an epoch, at whatever it is doing; then `--resume`."""
    script = Path(train_mlip.__file__)
    run = [*files, *SMALL, "--epochs", "12", "--every", "1", "--out"]
    assert train_mlip.main([*run, str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(script), *run, str(killed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: torch's sums depend on it
    )
    end = time.monotonic() + 120
    while not (killed / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    done = torch.load(killed / "checkpoint.pt", weights_only=True)["trainer"]["epoch"]
    assert 1 <= done < 12 and not (killed / "potential.pt").exists()
    assert train_mlip.main([*run, str(killed), "--resume"]) == 0
    ends = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert ends[0] == ends[1] and ends[0].count("\n") == 12
    potentials = [torch.load(tmp_path / n / "potential.pt", weights_only=True) for n in ("whole", "killed")]
    for name, value in potentials[0]["weights"].items():
        assert torch.equal(value, potentials[1]["weights"][name]), name


@pytest.mark.parametrize(
    ("device", "batch", "kind"),
    [
        ("cpu", 4, "copper"),
        ("cpu", 3, "copper"),
        ("cpu", 4, "mixed"),
        ("cuda", 3, "copper"),
        ("cuda", 3, "mixed"),
    ],
)
def test_two_processes_go_the_way_of_one(files, mixed_files, tmp_path, monkeypatch, device, batch, kind):
    """The same batches, shared out; equal but for rounding, which training amplifies: hence float64.

    Of 10 training frames batches of 3 leave one: a process has none then. On GPUs in graphs. In the mixed
    file one process may have no stress where the other has.
    """
    files = {"copper": files, "mixed": [*mixed_files, "--valid-fraction", "0.3"]}[kind]
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    run = [*files, *SMALL, "--epochs", "3", "--every", "1", "--batch-size", str(batch), "--device", device]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    curves = []
    for count in (1, 2):
        rows, _ = processes.train(count, tmp_path / str(count), [*run, "--dtype", "float64"])
        assert f"{count} processes of 1 threads" in (tmp_path / str(count) / "log").read_text()
        curves.append(rows)
    assert len(curves[0]) == 3
    for alone, both in zip(*curves, strict=True):
        for which in ("train", "validation"):
            assert both[which] == pytest.approx(alone[which], rel=1e-8)
    assert curves[0][2]["train"]["loss"] < 0.9 * curves[0][0]["train"]["loss"]


def test_stops_when_validation_gets_no_better(files, tmp_path, capsys):
    """A learning rate that is far too large: the potential of the best epoch is kept, not the last."""
    run = [*files, *SMALL, "--epochs", "40", "--every", "1", "--patience", "2", "--learning-rate", "0.3"]
    run += ["--out", str(tmp_path)]
    assert train_mlip.main(run) == 0
    trainer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]
    assert trainer["epoch"] < 40 and trainer["epoch"] == trainer["best"]["epoch"] + 2
    assert f"no lower validation loss since epoch {trainer['best']['epoch']}," in capsys.readouterr().out
    saved = torch.load(tmp_path / "potential.pt", weights_only=True)["weights"]
    for name, value in trainer["best"]["weights"].items():
        assert torch.equal(saved[name], value)
    assert any(not torch.equal(saved[name], value) for name, value in trainer["averaged"].items())
    assert train_mlip.main([*run, "--resume"]) == 0  # nothing is left to do but to conclude
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]["epoch"] == trainer["epoch"]


def test_json_lines_are_json():
    """No NaN in them: JSON has none, and files without a periodic frame have no stress."""
    from mlip.report import json_lines

    text = json_lines([{"epoch": 1, "validation": {"energy": 0.5, "stress": float("nan")}}])
    assert text == '{"epoch": 1, "validation": {"energy": 0.5, "stress": null}}\n'
