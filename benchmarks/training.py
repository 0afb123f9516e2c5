"""Structures a second in training: the layer in the model, and the same model fed by other lists.

    python benchmarks/training.py --device cuda --train train.extxyz --json training.json

One model (`examples/mlip`), one loss on energies, forces and stresses, the same batches; only lists differ:

    layer               the layer searches in every step
    layer, once         once a structure, `pair_vectors` makes the vectors
    vesin, matscipy     their search in every step (matscipy's on the CPU), r_j - r_i + S @ h in plain torch
    plain torch, once   lists made before the clock starts, r_j - r_i + S @ h in plain torch

Steps without a shape that depends on data can be captured as a graph (`examples/mlip/graphs.py`). Peers'
lists cannot: they wait for the device or leave it. Lists made beforehand can, whosever they are: "plain
torch, once" in a graph is what remains of the layer's lead there. Variants take turns, and the median of the
rounds counts. At the end the layer's share of a step, not in a graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from harness import is_gpu, seconds
from peers import GATHERS, plain_vectors
from torch import Tensor, nn

import diffnl

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mlip.calculator import build_potential
from mlip.data import make_copper, read_frames
from mlip.model import ModelConfig, Potential
from mlip.profiling import layer_share, share_table
from mlip.training import Settings, Trainer, chunks, fit_config

GATHER = GATHERS["index_select"]  # the one whose derivative is faster


class PeerLists(nn.Module):
    """`search(positions, cell, pbc) -> mapping, shifts` of a system, for every system of a batch."""

    def __init__(self, search):
        super().__init__()
        self.search = search

    def forward(self, positions: Tensor, cell: Tensor, pbc: Tensor, system_idx: Tensor) -> diffnl.Pairs:
        first, mappings, shifts = 0, [], []
        for k, count in enumerate(torch.bincount(system_idx, minlength=len(cell)).tolist()):
            of_system = positions.detach()[first : first + count], cell.detach()[k], pbc[k]
            found, shift = self.search(*of_system)
            mappings.append(found.to(torch.int64) + first)
            shifts.append(shift)
            first += count
        mapping, shifts = torch.cat(mappings, 1), torch.cat(shifts)
        return diffnl.Pairs(
            mapping, shifts, plain_vectors(GATHER, positions, cell, mapping, shifts, system_idx)
        )


def vesin(cutoff: float):
    from vesin import NeighborList

    neighbor_list = NeighborList(
        cutoff=cutoff, full_list=True, sorted=True
    )  # the model sums over ascending i

    def search(positions: Tensor, cell: Tensor, pbc: Tensor):
        pairs, shifts = neighbor_list.compute(positions, cell, pbc, "PS", copy=True)
        return pairs.view(torch.int64).t(), shifts

    return search


def matscipy(cutoff: float):
    from matscipy.neighbours import neighbour_list

    def search(positions: Tensor, cell: Tensor, pbc: Tensor):
        arrays = (x.double().cpu().numpy() for x in (positions, cell))
        where = dict(zip(("positions", "cell"), arrays, strict=True))
        i, j, shifts = neighbour_list("ijS", **where, pbc=pbc.cpu().numpy(), cutoff=cutoff)
        mapping = torch.stack([torch.from_numpy(x).to(torch.int64) for x in (i, j)])
        return mapping.to(positions.device), torch.from_numpy(shifts).to(positions.device, torch.int32)

    return search


class PlainPotential(Potential):
    """The model with vectors of known pairs in plain torch."""

    def pairs(self, positions, cell, pbc, system_idx, known):
        mapping, shifts, num_pairs = known
        vectors = plain_vectors(GATHER, positions, cell, mapping, shifts, system_idx)
        return diffnl.PaddedPairs(mapping, shifts, vectors, num_pairs)


# Name, whether lists are made beforehand, and whether the step is captured.
VARIANTS = {
    "layer, graph": ("layer", False, True),
    "layer": ("layer", False, False),
    "layer, once, graph": ("layer", True, True),
    "layer, once": ("layer", True, False),
    "plain torch, once, graph": ("plain", True, True),
    "plain torch, once": ("plain", True, False),
    "vesin": (vesin, False, False),
    "matscipy": (matscipy, False, False),
}
PEERS = ("vesin", "matscipy")


def trainer_of(kind, once: bool, graphs: bool, frames, options: argparse.Namespace) -> Trainer:
    config = ModelConfig(
        species=(), cutoff=options.cutoff, channels=options.channels,
        hidden_lmax=options.hidden_lmax, edge_lmax=options.edge_lmax,
    )  # fmt: skip
    config, scales = fit_config(frames, config)
    weights = {"energy_weight": 1.0, "force_weight": 1.0, "stress_weight": 1.0}
    settings = Settings(epochs=100, seed=0, batch_size=options.batch_size, learning_rate=1e-4, **weights)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = build_potential(config, device, torch.float32)
    if kind == "plain":
        model.__class__ = PlainPotential
    elif kind != "layer":
        model.neighbors = PeerLists(kind(config.cutoff))
    frames = [frame.on(device, torch.float32) for frame in frames]
    if once:
        frames = [frame.with_list(config.cutoff) for frame in frames]
    return Trainer(model, scales, settings, frames, device, torch.float32, graphs=graphs)


def step_ms(trainer: Trainer, batches: list, steps: int) -> float:
    """Milliseconds of a step, after one that is not counted."""
    trainer.train_step(batches[0])

    def run():
        for k in range(steps):
            trainer.train_step(batches[k % len(batches)])

    return 1e3 * seconds(run, trainer.device) / steps


def compare(frames, options: argparse.Namespace) -> dict:
    """Structures a second of each variant, its loss on the same first batch, and why one is missing."""
    trainers, found = {}, {}
    for name, (kind, once, graphs) in VARIANTS.items():
        if graphs and not is_gpu(options.device):
            continue
        try:
            trainer = trainer_of(kind, once, graphs, frames, options)
            batches = list(chunks(trainer.frames, options.batch_size))[: options.steps]
            loss = trainer.train_step(batches[0])["loss"].item()
        except ImportError as error:
            found[name] = {"missing": str(error)}
            continue
        trainers[name], found[name] = (trainer, batches), {"first_loss": loss, "step_ms": []}
    for _ in range(options.rounds):
        for name, (trainer, batches) in trainers.items():
            found[name]["step_ms"].append(step_ms(trainer, batches, options.steps))
    for name in trainers:
        median = statistics.median(found[name]["step_ms"])
        found[name]["structures_per_s"] = 1e3 * options.batch_size / median
    share = layer_share(trainers["layer"][0], options.steps)
    return {"options": vars(options), "torch": torch.__version__, "variants": found, "share": share}


def table(result: dict) -> str:
    """Rates, and each over the best peer's."""
    found = {name: row for name, row in result["variants"].items() if "structures_per_s" in row}
    peers = [found[name]["structures_per_s"] for name in PEERS if name in found]
    lines = [f"{'':<28}{'structures/s':>14}{'ms a step':>12}{'over the best peer':>20}{'first loss':>14}"]
    for name, row in result["variants"].items():
        if name not in found:
            lines.append(f"{name:<28}{'not here: ' + row['missing']}")
            continue
        over = f"{row['structures_per_s'] / max(peers):.2f}x" if peers else ""
        ms = statistics.median(row["step_ms"])
        lines.append(
            f"{name:<28}{row['structures_per_s']:>14.0f}{ms:>12.2f}{over:>20}{row['first_loss']:>14.6f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train", help="a file ASE reads; none: copper cells")
    add("--device", default="cpu")
    add("--batch-size", type=int, default=4)
    add("--steps", type=int, default=40, help="in a round")
    add("--rounds", type=int, default=5)
    add("--cutoff", type=float, default=5.0)
    add("--channels", type=int, default=32)
    add("--hidden-lmax", type=int, default=2)
    add("--edge-lmax", type=int, default=3)
    add("--json", type=Path)
    options = parser.parse_args()
    if is_gpu(options.device):
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    frames = read_frames(options.train) if options.train else make_copper(40, seed=0)
    result = compare(frames, options)
    print(table(result), "\n\n" + share_table(result["share"]), sep="")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
