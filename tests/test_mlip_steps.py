"""The parts of the example's training steps: sums over pairs, padding to fixed shapes, orders of labels."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("ase")
import ase  # noqa: E402
import ase.io  # noqa: E402

import diffnl  # noqa: E402
from diffnl.stress import to_voigt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_mlip  # noqa: E402
from alloys import CPU, labelled  # noqa: E402
from mlip.calculator import build_potential  # noqa: E402
from mlip.data import atoms_from_frame, collate, frame_from_atoms, make_copper, split  # noqa: E402
from mlip.graphs import Predictor, Room, cut  # noqa: E402
from mlip.labels import find_orders, reorder  # noqa: E402
from mlip.model import ModelConfig  # noqa: E402
from mlip.sums import PairSums  # noqa: E402
from mlip.training import Scales, Settings, Trainer, fit_config, predict  # noqa: E402
from test_train_mlip import SMALL  # noqa: E402


def potential(dtype=torch.float64):
    torch.manual_seed(3)
    config = ModelConfig(species=(29,), cutoff=4.0, channels=4, num_neighbors=20.0)
    return build_potential(config, CPU, dtype)


def mixed_frames():
    """Crystals of different sizes and pbc, and a molecule in open boundaries."""
    frames = [frame for frame in make_copper(6, seed=2) if len(frame.numbers) <= 16]
    frames[0] = replace(frames[0], pbc=torch.tensor([True, True, False]))
    molecule = ase.Atoms("Cu3", positions=[[0, 0, 0], [2.2, 0, 0], [0.4, 2.0, 0.3]])
    return [*frames, frame_from_atoms(labelled(molecule), "molecule")]


@pytest.mark.parametrize("capacity", [0, 5])
def test_a_list_without_room_has_no_energy(capacity):
    """Sums over pairs that are not there would be the atoms' reference energies."""
    model = potential()
    batch = collate(make_copper(1, seed=2)[:1], CPU, torch.float64)
    where = batch.numbers, batch.positions, batch.cell, batch.pbc, batch.system_idx
    expected = model(*where)
    model.neighbors.capacity = capacity
    assert model(*where).isnan().all()
    model.neighbors.capacity = 4_000
    torch.testing.assert_close(model(*where), expected)


# Sums.


@pytest.mark.parametrize("spare", [None, 0, 9])
def test_segments_add_up_what_index_add_does(spare):
    """Derivatives too, with a padded list as well."""
    torch.manual_seed(1)
    cell = 3.0 * torch.eye(3, dtype=torch.float64)
    positions = torch.rand(6, 3, dtype=torch.float64) @ cell
    count = diffnl.neighbor_pairs(positions, cell, True, 2.5).mapping.shape[1]
    capacity = None if spare is None else count + spare
    pairs = diffnl.neighbor_pairs(positions, cell, True, 2.5, capacity=capacity)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(count, 2, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(pairs.mapping.shape[1] - count, 2, dtype=torch.float64)  # a model's, of padding
    by_segments, by_index_add = (PairSums(pairs, 6, segments=way) for way in (True, False))
    padded = torch.cat([y, zeros])
    torch.testing.assert_close(by_segments.over_neighbors(padded), by_index_add.over_neighbors(padded))
    assert torch.equal(by_segments.of_neighbors(x), by_index_add.of_neighbors(x))

    def run(sums):
        return lambda x, y: (
            sums.of_neighbors(x)[:count].pow(3),
            sums.over_neighbors(torch.cat([y, zeros])).pow(3),
        )

    assert torch.autograd.gradcheck(run(by_segments), (x, y))
    assert torch.autograd.gradgradcheck(run(by_segments), (x, y))


def test_segments_of_a_failed_list_are_nan():
    cell = 3.0 * torch.eye(3, dtype=torch.float64)
    positions = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [float("nan"), 0, 0]], dtype=torch.float64)
    pairs = diffnl.neighbor_pairs(positions, cell, True, 2.5, capacity=50)
    assert pairs.num_pairs < 0
    sums = PairSums(pairs, 3, segments=True)
    assert sums.over_neighbors(pairs.vectors).isnan().any()


# Fixed shapes, lists made once.


@pytest.mark.parametrize("once", [False, True])
def test_padding_changes_nothing(once):
    """Energies, forces, stresses and the gradients of the parameters, in one shape for all batches."""
    frames = mixed_frames()
    if once:
        frames = [frame.with_list(4.0) for frame in frames]
    model, padded = potential(), potential()
    room = Room.for_batches(frames, 3, 4.0)
    padded.neighbors = diffnl.NeighborList(4.0, capacity=room.pairs)
    shapes = set()
    for batch in (collate(frames[:3], CPU, torch.float64), collate(frames[3:], CPU, torch.float64)):
        inputs = room.pad(batch)
        shapes.add(tuple(x.shape for x in inputs))
        ours, theirs = cut(Predictor(padded)(*inputs), batch), predict(model, batch, create_graph=True)
        gradients = []
        for (energy, forces, stress), of in ((ours, padded), (theirs, model)):
            values = energy, forces, stress[batch.with_stress]
            loss = sum(value.square().sum() for value in values)
            gradients.append(torch.autograd.grad(loss, list(of.parameters())))
        for one, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)
        assert theirs[1].abs().max() > 0.1
    assert len(shapes) == 1


def test_a_batch_does_not_fit():
    """A room for one structure is none for three: NaN, never a wrong energy."""
    frames = mixed_frames()
    few = Room.for_batches(frames[:1], 1, 4.0)
    room = replace(Room.for_batches(frames, 3, 4.0), pairs=few.pairs)
    model = potential()
    model.neighbors = diffnl.NeighborList(4.0, capacity=room.pairs)
    assert Predictor(model)(*room.pad(collate(frames[:3], CPU, torch.float64)))[1].isnan().any()


def test_lists_made_once_train_as_the_layer_does(tmp_path):
    frames = [frame for frame in make_copper(20, seed=1) if len(frame.numbers) <= 8]
    ase.io.write(tmp_path / "train.extxyz", [atoms_from_frame(frame) for frame in frames])
    run = ["--train", str(tmp_path / "train.extxyz"), *SMALL, "--epochs", "2", "--dtype", "float64"]
    losses = []
    for lists in ("every-step", "once"):
        assert train_mlip.main([*run, "--lists", lists, "--out", str(tmp_path / lists)]) == 0
        lines = (tmp_path / lists / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train"]["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(losses[0]) == 2


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_molecule_leaves_the_gradients_of_a_stress_loss_alone(padded, once):
    """Crystal, slab and molecule against crystal and slab: equal but for the order of the network's sums."""
    frames = mixed_frames()
    frames = [frames[1], frames[0], frames[-1]]
    assert [frame.has_stress for frame in frames] == [True, True, False] and not frames[2].cell.any()
    frames = [frame.with_list(4.0) for frame in frames] if once else frames
    settings = Settings(
        epochs=1, seed=0, batch_size=3, learning_rate=0.01, energy_weight=0, force_weight=0, stress_weight=1
    )
    scales = Scales(energy=1.0, forces=1.0, stress=1e-2)
    found = []
    for group in (frames, frames[:2]):
        trainer = Trainer(potential(), scales, settings, group, CPU, torch.float64)
        if padded:
            trainer.room = Room.for_batches(frames, 3, 4.0)
            trainer.model.neighbors = diffnl.NeighborList(4.0, capacity=trainer.room.pairs)
        loss = trainer.train_step(group)["loss"]
        found.append([loss, *(p.grad for p in trainer.model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert all(torch.isfinite(value).all() for value in found[0]) and found[0][0] > 0
    assert max(gradient.abs().max() for gradient in found[0][1:]) > 1e-3


# Orders of shears.


def with_groups():
    """Copper in two groups, of which "b" has its shears as LAMMPS writes them (xy, xz, yz), and the truth."""
    true = [replace(frame, group="ab"[k % 2]) for k, frame in enumerate(make_copper(40, seed=4))]
    return true, reorder(true, {"b": (2, 1, 0)})


def voigt(stresses):
    """Six components of each, as `evaluate` gives them."""
    return to_voigt(stresses).numpy().ravel()


def test_reorder_moves_shears_alone():
    true, given = with_groups()
    assert reorder(given, {"b": (2, 1, 0)})[1].stress.equal(true[1].stress)
    assert given[0] is true[0] and not given[1].stress.equal(true[1].stress)
    assert to_voigt(given[1].stress)[[0, 1, 2, 5, 4, 3]].equal(to_voigt(true[1].stress))


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_finds_the_order(noise):
    true, given = with_groups()
    stresses = torch.stack([frame.stress for frame in true])
    stresses = stresses + noise * torch.randn(stresses.shape, generator=torch.Generator().manual_seed(0))
    found = find_orders(given, voigt(stresses))
    assert list(found) == ["b"] and found["b"][0] == (2, 1, 0)
    assert found["b"][2] < 0.1 * found["b"][1] + 2 * noise
    assert find_orders(true, voigt(stresses)) == {}


def test_does_not_guess():
    """Too few structures, or a potential that knows nothing of shears: as given."""
    true, given = with_groups()
    stresses = torch.stack([frame.stress for frame in true])
    assert find_orders(given[:8], voigt(stresses[:8])) == {}
    shuffled = stresses[torch.randperm(len(stresses), generator=torch.Generator().manual_seed(1))]
    assert find_orders(given, voigt(shuffled)) == {}


def test_detects_and_says_so(tmp_path, capsys):
    """The whole run: a file half of which has its shears in another order trains as the right one does."""
    true, given = with_groups()
    results = {}
    for name, frames in (("true", true), ("given", given)):
        images = [atoms_from_frame(frame) for frame in frames]
        for atoms, frame in zip(images, frames, strict=True):
            atoms.info["group"] = frame.group
        ase.io.write(tmp_path / f"{name}.extxyz", images)
        run = ["--train", str(tmp_path / f"{name}.extxyz"), *SMALL, "--epochs", "15"]
        for order in ("as-given", "detect"):
            out = tmp_path / f"{name}_{order}"
            assert train_mlip.main([*run, "--stress-order", order, "--out", str(out)]) == 0
            results[name, order] = capsys.readouterr().out
            last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            results[name, order, "loss"] = last["train"]["loss"]
    words = "structures of group \"b\": the file's shear stresses are xy, xz, yz, not ASE's yz, xz, xy"
    assert words in results["given", "detect"] and "as the test file has them" in results["given", "detect"]
    assert "warning: " + words in results["given", "as-given"]
    assert "in ASE's order" in results["true", "detect"] and "warning" not in results["true", "as-given"]
    assert results["given", "detect", "loss"] == results["true", "detect", "loss"]
    assert results["given", "as-given", "loss"] > results["given", "detect", "loss"]


def test_a_scout_looks_at_the_diagonal_alone():
    """Its loss and gradients are the same whatever the shears are."""
    frames, _ = split(make_copper(8, seed=1), 0.2, 0)
    config, scales = fit_config(frames, ModelConfig(species=(), cutoff=4.0, channels=4))
    weights = {"energy_weight": 1.0, "force_weight": 1.0, "stress_weight": 1.0}
    settings = Settings(epochs=1, seed=0, batch_size=2, learning_rate=0.01, shear=False, **weights)
    off = torch.tensor([[0.0, 0.3, -0.2], [0.3, 0.0, 0.1], [-0.2, 0.1, 0.0]], dtype=torch.float64)
    losses = []
    for shear in (0.0, 1.0):
        torch.manual_seed(0)
        model = build_potential(config, CPU, torch.float64)
        moved = [replace(frame, stress=frame.stress + shear * off) for frame in frames]
        trainer = Trainer(model, scales, settings, moved, CPU, torch.float64)
        losses.append([trainer.train_step(moved[:2])["loss"].item() for _ in range(2)])
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0]).all()
