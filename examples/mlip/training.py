"""The training loop: loss, schedule, averaged weights, checkpoints that resume to the same numbers."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import huber_loss
from torch.optim.swa_utils import get_ema_multi_avg_fn

import diffnl
from diffnl.stress import to_voigt

from .data import Batch, Frame, LabelError, collate
from .graphs import Predictor, Room, capture, cut, derivatives
from .model import ModelConfig, Potential, load_weights, weights
from .parallel import ALONE, Group


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, besides the data and the seed's random numbers."""

    epochs: int
    seed: int
    batch_size: int
    learning_rate: float
    energy_weight: float
    force_weight: float
    stress_weight: float
    patience: int = 0
    weight_decay: float = 0.0
    huber_delta: float = 0.1
    shear: bool = True  # False: of the stress only the diagonal counts
    averaging: float = 0.99
    max_gradient: float = 10.0


@dataclass(frozen=True)
class Scales:
    """The spread of each label over the training set; errors are divided by it before they are compared."""

    energy: float  # eV/atom, about the reference energies
    forces: float  # eV/Å
    stress: float  # eV/Å³


def fit_config(frames: list[Frame], config: ModelConfig) -> tuple[ModelConfig, Scales]:
    """Fill in what the data decides: species, reference energies, scale, mean number of neighbours.

    The reference energies are the least-squares fit of the energies by the composition alone (of the
    smallest norm where the compositions do not tell the species apart). Raises LabelError if no frame has a
    stress.
    """
    species = sorted({int(number) for frame in frames for number in frame.numbers})
    composition = np.array(
        [[(frame.numbers == number).sum().item() for number in species] for frame in frames]
    )
    energies = np.array([frame.energy.item() for frame in frames])
    counts = composition.sum(1)
    # Per atom, so that a big cell does not outweigh a small one.
    reference = np.linalg.lstsq(composition / counts[:, None], energies / counts, rcond=None)[0]
    residual = (energies - composition @ reference) / counts
    forces = torch.cat([frame.forces for frame in frames])
    if not any(frame.has_stress for frame in frames):
        raise LabelError(
            "no training frame has a stress: it takes a label (extended XYZ: `stress=` in eV/Å³), a periodic "
            "axis and a cell with a volume, in one structure at least that the validation split leaves"
        )
    stress = torch.stack([frame.stress for frame in frames if frame.has_stress])
    scales = Scales(
        energy=max(float(np.sqrt(np.mean(residual**2))), 1e-3),
        forces=max(forces.square().mean().sqrt().item(), 1e-2),
        stress=max((stress - stress.mean(0)).square().mean().sqrt().item(), 1e-4),
    )
    pairs = sum(
        diffnl.neighbor_pairs(frame.positions, frame.cell, frame.pbc, config.cutoff).mapping.shape[1]
        for frame in frames
    )
    config = replace(
        config,
        species=tuple(species),
        reference_energies=tuple(reference.tolist()),
        scale=scales.forces,
        num_neighbors=max(pairs / int(counts.sum()), 1.0),
    )
    return config, scales


def check_species(frames: list[Frame], species: set[int], name: str) -> None:
    """Raises LabelError if `frames` hold an element that the training set does not."""
    for index, frame in enumerate(frames):
        unknown = sorted(set(frame.numbers.tolist()) - species)
        if unknown:
            raise LabelError(
                f"{name}: frame {index} has atomic number {unknown[0]}, which is in no training frame"
            )


def predict(model: Potential, batch: Batch, *, create_graph: bool):
    """Energies (B,) eV, forces (N, 3) eV/Å and stresses (B, 3, 3) eV/Å³ of a batch."""
    return derivatives(model, *batch.inputs, batch.known, create_graph)


def errors(prediction, batch: Batch) -> dict[str, torch.Tensor]:
    """Prediction minus label, float64: energy per atom (B,), forces (N, 3), stress (those with one, 3, 3)."""
    energy, forces, stress = prediction
    return {
        "energy": (energy - batch.energy) / batch.counts,
        "forces": forces.double() - batch.forces,
        "stress": (stress.double() - batch.stress).index_select(0, batch.with_stress),
    }


def count_labels(frames: list[Frame]) -> dict[str, int]:
    """How many numbers `errors` has for each kind of label."""
    atoms, stresses = (sum(x) for x in zip(*((len(f.numbers), f.has_stress) for f in frames), strict=True))
    return {"energy": len(frames), "forces": 3 * atoms, "stress": 9 * stresses}


def write_atomically(values: dict | str, path: Path) -> None:
    """Text, or torch.save, that leaves either the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if isinstance(values, str):
            file.write(values.encode())
        else:
            torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def copy_of_weights(model: Potential) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in weights(model).items()}


class Trainer:
    """A model in training. `state` is all there is: two trainers with equal states go on to the same bits.

    The trainers of a group of processes go the same way, with the same state: each has its part of the steps.
    """

    def __init__(
        self,
        model: Potential,
        scales: Scales,
        settings: Settings,
        frames: list[Frame],
        device,
        dtype,
        group: Group = ALONE,
        graphs: bool = False,
    ):
        self.model, self.scales, self.settings = model, scales, settings
        self.device, self.dtype, self.group = device, dtype, group
        self.frames = frames  # best where they are trained on, see `Frame.on`
        # Validation, the saved potential and the reports use a running mean of the weights, which is
        # quieter than the weights.
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        predictor, self.room = Predictor(model), None
        if graphs:
            share = math.ceil(settings.batch_size / group.size)
            self.room = Room.for_batches(frames, share, model.config.cutoff)
            predictor = capture(predictor, self.room, collate(self.frames[:1], device, dtype))
        self.predictor = group.wrap(predictor)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.random = torch.Generator().manual_seed(settings.seed)
        self.epoch = self.step = 0
        self.history: list[dict] = []
        # The averaged weights of the lowest validation loss, and how many validations have passed since.
        self.best: dict = {"loss": math.inf, "epoch": 0, "weights": copy_of_weights(self.averaged)}
        self.since_best = 0
        self.steps_per_epoch = math.ceil(len(frames) / settings.batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch

    def learning_rate(self) -> float:
        """Linear warm-up over 2 % of the steps, then half a cosine down to 1 %."""
        warmup = max(1, round(0.02 * self.total_steps))
        if self.step < warmup:
            return self.settings.learning_rate * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, self.total_steps - warmup)
        return self.settings.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))

    @property
    def terms(self) -> dict[str, tuple[float, float]]:
        """Weight and spread of each kind of label."""
        return {
            "energy": (self.settings.energy_weight, self.scales.energy),
            "forces": (self.settings.force_weight, self.scales.forces),
            "stress": (self.settings.stress_weight, self.scales.stress),
        }

    def loss(self, error: dict[str, torch.Tensor], factors: dict[str, float]) -> torch.Tensor:
        """Huber losses of errors over the labels' spread: a few wild structures must not rule the rest."""
        total = 0.0
        for key, (weight, scale) in self.terms.items():
            if error[key].numel():  # a batch may hold no frame with a stress
                scaled = error[key] / scale
                if key == "stress" and not self.settings.shear:
                    scaled = scaled * torch.eye(3, dtype=scaled.dtype, device=scaled.device)
                delta = self.settings.huber_delta
                mean = huber_loss(scaled, torch.zeros_like(scaled), delta=delta) / delta
                total = total + weight * factors[key] * mean
        return total

    def predict(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Energies, forces and stresses of a batch, to be differentiated with respect to the parameters."""
        if self.room is not None:
            return cut(self.predictor(*self.room.pad(batch)), batch)
        return self.predictor(*batch.inputs, *(batch.known or ()))

    def train_step(self, frames: list[Frame]) -> dict[str, torch.Tensor]:
        """A step on a batch, of which this process takes its share: loss and errors of that share."""
        own, counts = self.group.share(frames)
        batch = collate(own, self.device, self.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        error = errors(self.predict(batch), batch)
        everywhere = count_labels(frames)
        factors = self.group.factors(
            count_labels(own) if counts else dict.fromkeys(everywhere, 0), everywhere
        )
        loss = self.loss(error, factors)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient)
        self.optimizer.step()
        self.step += 1
        decay = min(self.settings.averaging, self.step / (self.step + 9))
        means, parameters = (list(model.parameters()) for model in (self.averaged, self.model))
        get_ema_multi_avg_fn(decay)(means, parameters, self.step)
        found = {"loss": loss.detach()}
        return found | {key: value.detach() if counts else value[:0].detach() for key, value in error.items()}

    def train_epoch(self, on_step: Callable[[], None]) -> dict[str, float]:
        """One pass in random order; returns the mean loss and the mean absolute errors on the way."""
        order = torch.randperm(len(self.frames), generator=self.random, device="cpu").tolist()
        collected: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(order), self.settings.batch_size):
            result = self.train_step(
                [self.frames[k] for k in order[start : start + self.settings.batch_size]]
            )
            for key, value in result.items():
                collected.setdefault(key, []).append(value.reshape(-1))
            on_step()
        self.epoch += 1
        joined = {key: torch.cat(values).abs().double() for key, values in collected.items()}
        sums = self.group.sum([value.sum().item() for value in joined.values()])
        counts = self.group.sum([float(value.numel()) for value in joined.values()])
        # NaN where no frame has a stress.
        means = {
            key: total / n if n else math.nan for key, total, n in zip(joined, sums, counts, strict=True)
        }
        # Looked at once an epoch: to look at every step would be to wait for the device at every step.
        if not math.isfinite(means["loss"]):
            raise RuntimeError(
                f"the loss is {means['loss']} in epoch {self.epoch}: try a smaller --learning-rate"
            )
        return means

    def record(self, row: dict[str, float | dict]) -> None:
        """Takes down what a validation has found: mean absolute errors in `row["validation"]`."""
        self.history.append(row)
        found = row["validation"]
        loss = sum(
            weight / scale * found[key]
            for key, (weight, scale) in self.terms.items()
            if math.isfinite(found[key])
        )
        self.since_best += 1
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "epoch": row["epoch"], "weights": copy_of_weights(self.averaged)}
            self.since_best = 0

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.since_best

    def result(self) -> Potential:
        """The model to keep: the averaged one; with a patience, as it was at the lowest validation loss."""
        if self.settings.patience > 0:
            load_weights(self.averaged, self.best["weights"])
        return self.averaged

    def state(self) -> dict:
        return {
            "best": self.best,
            "since_best": self.since_best,
            "model": weights(self.model),
            "averaged": weights(self.averaged),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
        }

    def load_state(self, state: dict) -> None:
        load_weights(self.model, state["model"])
        load_weights(self.averaged, state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.best, self.since_best = state["best"], state["since_best"]


def evaluate(
    model: Potential, frames: list[Frame], device, dtype, batch_size: int
) -> dict[str, dict[str, np.ndarray]]:
    """{"energy" | "forces" | "stress": {"label": (M,), "prediction": (M,)}} over `frames`.

    Energies are per atom (eV/atom); forces are all components (eV/Å); stresses are the six components
    xx, yy, zz, yz, xz, xy (eV/Å³) of every frame that has one.
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"energy": [], "forces": [], "stress": []}
    for group in chunks(frames, batch_size):
        batch = collate(group, device, dtype)
        energy, forces, stress = (
            value.detach().double() for value in predict(model, batch, create_graph=False)
        )
        parts["energy"].append((batch.energy / batch.counts, energy / batch.counts))
        parts["forces"].append((batch.forces, forces))
        parts["stress"].append(tuple(to_voigt(value[batch.with_stress]) for value in (batch.stress, stress)))
    return {
        key: {
            name: torch.cat([pair[column].reshape(-1) for pair in pairs]).cpu().numpy()
            for column, name in enumerate(("label", "prediction"))
        }
        for key, pairs in parts.items()
    }


def chunks(frames: list[Frame], size: int) -> Iterable[list[Frame]]:
    for start in range(0, len(frames), size):
        yield frames[start : start + size]
