#!/usr/bin/env python
"""Train an E(3)-equivariant message-passing potential on energies, forces and stresses.

    python examples/train_mlip.py                    # makes a small copper set itself; two or three minutes
    python examples/train_mlip.py --train train.extxyz --test test.extxyz --epochs 150
    torchrun --nproc-per-node 2 examples/train_mlip.py --device cuda ...    # the same batches, shared out

The neighbour list is a layer of the model (`mlip/model.py`): forces and stresses are its derivatives, and
training on them differentiates through it twice; on a GPU as a captured graph (`mlip/graphs.py`). The
output folder receives `checkpoint.pt` after every validation and at least every ten seconds (the same
command with `--resume` goes on from it, to the same numbers as a run that was never stopped, or killed), with
`metrics.jsonl`, a line for each validation, and at the end `potential.pt`, an ASE calculator's input
(`mlip/calculator.py`), `parity.png` and `learning_curve.png`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

# Read by cuBLAS when it starts: a fixed workspace makes its results the same run after run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import ase.io
import torch
from mlip import report
from mlip.calculator import PotentialCalculator, build_potential, relax_strained, save_potential
from mlip.data import Frame, atoms_from_frame, fingerprint, make_copper, read_frames, split
from mlip.labels import describe, find_orders, reorder
from mlip.model import ModelConfig
from mlip.parallel import Group, start
from mlip.profiling import layer_share, share_table
from mlip.progress import watch
from mlip.training import Settings, Trainer, check_species, evaluate, fit_config, write_atomically
from tqdm import tqdm

from diffnl.stress import to_gpa

CHECKPOINT_SECONDS = 10.0
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--train",
        help="a file ASE reads, with energy and forces, and stress where structures have one: it may mix "
        "crystals, slabs and molecules; none: a copper set is made with EMT",
    )
    add("--test", help="the same for the final test; none: a tenth of the training file is held out")
    add("--out", type=Path, default=Path("runs/mlip"), help="output folder")
    add("--epochs", type=int, default=40, help="passes over the training frames; the learning rate follows")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt; repeat the first run's options")
    add("--stop-after", type=int, metavar="N", help="stop after epoch N, as if interrupted; --resume goes on")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--batch-size", type=int, default=4, help="structures in a step, of all processes together")
    add("--learning-rate", type=float, default=0.01)
    add("--weight-decay", type=float, default=0.0, help="of AdamW, times the learning rate")
    add("--huber-delta", type=float, default=0.1, help="where the loss turns from squares to absolute values")
    add("--valid-fraction", type=float, default=0.05, help="part of the training frames held out")
    add("--energy-weight", type=float, default=1.0, help="of the loss, in units of its labels' spread")
    add("--force-weight", type=float, default=1.0, help="likewise")
    add("--stress-weight", type=float, default=1.0, help="likewise")
    add(
        "--stress-order",
        choices=("as-given", "detect"),
        default="as-given",
        help="detect: find out with a short training whether groups of structures have their shear stresses "
        "in another order than ASE's, and read them in that order (see mlip/labels.py)",
    )
    add(
        "--lists",
        choices=("every-step", "once"),
        default="every-step",
        help="whether the layer searches in every step, or once a structure, pair_vectors doing the rest",
    )
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="capture the step's derivatives as a CUDA or HIP graph (default: on a GPU)",
    )
    add(
        "--patience",
        type=int,
        default=0,
        help="stop after so many lines of the table without a lower validation loss, and keep the potential "
        "of the lowest; 0: train to the end and keep that",
    )
    add("--cutoff", type=float, default=5.0, help="Å")
    add("--layers", type=int, default=2, help="rounds of messages")
    add("--channels", type=int, default=16, help="features of each degree on an atom")
    add("--hidden-lmax", type=int, default=1, help="highest degree of the features that atoms send")
    add("--edge-lmax", type=int, default=2, help="highest degree of the spherical harmonics")
    add("--every", type=int, help="epochs between two lines of the table (default: about 20 lines in all)")
    add("--relax-steps", type=int, default=200, help="at most, in the relaxation at the end")
    add(
        "--profile-layer",
        type=int,
        metavar="N",
        default=0,
        help="at the end, time N more steps and the neighbour list's part of them (OUT/layer_share.json)",
    )
    options = parser.parse_args(arguments)
    if options.graphs is None:
        options.graphs = options.device.startswith("cuda")
    for name in ("epochs", "batch_size", "layers", "channels", "learning_rate", "cutoff"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.test and not options.train:
        parser.error("--test needs --train")
    return options


def load_data(options: argparse.Namespace, group: Group) -> tuple[list[Frame], list[Frame], list[Frame]]:
    """Training, validation and test frames."""
    if options.train:
        frames = read_frames(options.train)
        if options.test:
            test = read_frames(options.test)
        else:
            frames, test = split(frames, 0.1, options.seed + 1)
    else:
        frames, test = make_copper(160, seed=options.seed), make_copper(40, seed=options.seed + 1_000_000)
        for name, made in (("copper_train.extxyz", frames), ("copper_test.extxyz", test)) * group.leads:
            ase.io.write(options.out / name, [atoms_from_frame(frame) for frame in made])
    return *split(frames, options.valid_fraction, options.seed), test


def build(options: argparse.Namespace, train: list[Frame], group: Group, **changes) -> Trainer:
    """A trainer as the options say, but for `changes` of its settings."""
    config = ModelConfig(
        species=(), cutoff=options.cutoff, layers=options.layers, channels=options.channels,
        hidden_lmax=options.hidden_lmax, edge_lmax=options.edge_lmax,
    )  # fmt: skip
    config, scales = fit_config(train, config)
    settings = Settings(
        epochs=options.epochs, seed=options.seed, batch_size=options.batch_size,
        learning_rate=options.learning_rate, energy_weight=options.energy_weight,
        force_weight=options.force_weight, stress_weight=options.stress_weight, patience=options.patience,
        weight_decay=options.weight_decay, huber_delta=options.huber_delta,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    potential = build_potential(config, group.device, dtype)
    frames = [frame.on(group.device, dtype) for frame in train]
    if options.lists == "once":
        frames = [frame.with_list(config.cutoff) for frame in frames]
    settings = replace(settings, **changes)
    return Trainer(potential, scales, settings, frames, group.device, dtype, group, options.graphs)


def detect(options: argparse.Namespace, frames: list[Frame], group: Group) -> dict[str, tuple[int, ...]]:
    """The order of the shears in each group where it is not ASE's, from a short training without them."""
    scout = build(options, frames, group, epochs=min(40, math.ceil(options.epochs / 5)), shear=False)
    with watch("order of the shears", scout.total_steps, shown=group.leads) as update:
        for _ in range(scout.settings.epochs):
            scout.train_epoch(update)
    values = evaluate(scout.averaged, frames, scout.device, scout.dtype, options.batch_size)
    found = find_orders(frames, values["stress"]["prediction"])
    for name, (order, given, better) in found.items():
        tell(group, describe(name, order, to_gpa(given), to_gpa(better)))
    if not found:
        tell(group, "shear stresses are in ASE's order, as far as a short training can tell")
    return {name: order for name, (order, *_) in found.items()}


# Options that may differ between a run and its continuation.
FREE = {"out", "resume", "stop_after", "device", "graphs", "every", "relax_steps", "profile_layer"}
FREE |= {"train", "test"}  # wherever they lie: their frames are compared


def read_checkpoint(options: argparse.Namespace, data: str, group: Group) -> dict:
    """The checkpoint to go on from. Raises ValueError if it belongs to other options or other data."""
    path = options.out / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"--resume: there is no {path}")
    saved = torch.load(path, map_location=group.device, weights_only=True)
    for name, value in saved["options"].items():
        if getattr(options, name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {path} was made with {flag} {value}, not {getattr(options, name)}")
    if saved["data"] != data:
        raise ValueError(f"--resume: {path} was made with other training, validation or test frames")
    # The generators' states are CPU tensors whatever the device.
    saved["trainer"]["random"] = saved["trainer"]["random"].cpu()
    return saved


def tell(group: Group, text: str) -> None:
    """Prints, around the progress bar, in one process."""
    if group.leads:
        tqdm.write(text)


def train(trainer: Trainer, validation: list[Frame], options: argparse.Namespace, run: dict) -> bool:
    """Do the epochs that are left; False if `--stop-after` ended it early. `run` is for the checkpoints."""
    every = options.every or max(1, options.epochs // 20)
    first, training = trainer.epoch, 0.0
    run = {"options": {key: value for key, value in vars(options).items() if key not in FREE}} | run
    written = time.monotonic()
    last = min(options.epochs, options.stop_after or options.epochs)
    steps = last * trainer.steps_per_epoch
    with watch("training", steps, trainer.step, shown=trainer.group.leads) as update:
        tell(trainer.group, report.HEADER)
        while trainer.epoch < last and not trainer.out_of_patience:
            rate = trainer.learning_rate()
            begun = time.perf_counter()
            means = trainer.train_epoch(update)
            training += time.perf_counter() - begun
            validates = trainer.epoch % every == 0 or trainer.epoch in (1, options.epochs)
            if validates:
                values = evaluate(
                    trainer.averaged, validation, trainer.device, trainer.dtype, options.batch_size
                )
                held_out = {key: report.mean_absolute(value) for key, value in values.items()}
                trainer.record({"epoch": trainer.epoch, "train": means, "validation": held_out, "rate": rate})
                tell(trainer.group, report.epoch_row(trainer.epoch, means, held_out, rate))
            due = validates or trainer.epoch == last or time.monotonic() - written > CHECKPOINT_SECONDS
            if due and trainer.group.leads:
                write_atomically(run | {"trainer": trainer.state()}, options.out / "checkpoint.pt")
                # All lines anew, after the checkpoint they are in: who is killed in between loses nothing.
                write_atomically(report.json_lines(trainer.history), options.out / "metrics.jsonl")
                written = time.monotonic()
    speed = (trainer.epoch - first) * len(trainer.frames) / training if training else 0.0
    tell(trainer.group, f"\n{training:.1f} s of training steps, {speed:.0f} structures/s")
    if trainer.out_of_patience:
        best = trainer.best["epoch"]
        tell(trainer.group, f"no lower validation loss since epoch {best}, whose potential is kept")
    return trainer.epoch == options.epochs or trainer.out_of_patience


def conclude(
    trainer: Trainer,
    train: list[Frame],
    test: list[Frame],
    as_given: list[Frame],
    options: argparse.Namespace,
) -> None:
    """Test table, parity plot, saved potential, and a relaxation with it.

    `as_given` are the test frames as the file has them, `test` with the shears in the order detected.
    """
    arguments = (trainer.device, trainer.dtype, options.batch_size)
    potential = trainer.result()
    on_train, on_test = (evaluate(potential, frames, *arguments) for frames in (train, test))
    width = {"energy": 1, "forces": 3, "stress": 6}
    means = {key: on_train[key]["label"].reshape(-1, n).mean(0) for key, n in width.items()}
    print("\n" + report.final_table(on_test, means))
    if any(not torch.equal(frame.stress, given.stress) for frame, given in zip(test, as_given, strict=True)):
        errors = report.mean_absolute(evaluate(potential, as_given, *arguments)["stress"])
        print(f"stress with the shears as the test file has them: MAE {to_gpa(errors):.5f} GPa")
    for name, (order, given, better) in find_orders(train, on_train["stress"]["prediction"]).items():
        print(f"warning: {describe(name, order, to_gpa(given), to_gpa(better))}; see --stress-order")
    report.parity_plot(on_train, on_test, options.out / "parity.png")
    report.learning_curve(trainer.history, options.out / "learning_curve.png")
    save_potential(potential, options.out / "potential.pt")
    print(f"\nwrote potential.pt, parity.png, learning_curve.png and metrics.jsonl to {options.out}")

    periodic = [frame for frame in train if frame.has_stress and bool(frame.pbc.all())]
    if not periodic:
        print("no training structure is periodic along all three axes: there is no cell to relax")
        return
    calmest = min(periodic, key=lambda frame: (frame.forces.abs().max() + frame.stress.abs().max()).item())
    atoms = atoms_from_frame(calmest)
    calculator = PotentialCalculator(options.out / "potential.pt", trainer.device)
    states = relax_strained(atoms, calculator, options.relax_steps)
    print(f"\n{atoms.get_chemical_formula()}, stretched and sheared, then relaxed with the saved potential")
    print(
        f"as an ASE calculator (FIRE on positions and cell, {states[1]['steps']} steps)\n"
        + report.relaxation_table(states)
    )


def command_to_resume(arguments: list[str], processes: int) -> str:
    """The command line that goes on with the run that was started with `arguments`, to its last epoch."""
    words = [sys.executable] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    words.append(__file__)
    skip = False
    for word in arguments:
        flag, _, value = word.partition("=")
        stops = len(flag) > 4 and "--stop-after".startswith(flag)  # argparse takes shortened flags
        if not (skip or stops or word == "--resume"):
            words.append(word)
        skip = stops and not value
    return shlex.join([*words, "--resume"])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    try:
        if torch.device(options.device).type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"--device {options.device}: this torch finds no GPU")
            # Sums into atoms are scatter-adds: without this their order, and the last bits, would vary.
            torch.use_deterministic_algorithms(True)
            # It would also fill every new tensor, to find reads of what was never written.
            torch.utils.deterministic.fill_uninitialized_memory = False
        group = start(options.device)
        if options.profile_layer > 0 and group.size > 1:
            raise ValueError("--profile-layer is for one process")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    go_on = command_to_resume(sys.argv[1:] if arguments is None else arguments, group.size)
    try:
        return run(options, group, go_on)
    except KeyboardInterrupt:
        if group.leads:
            checkpoint = options.out / "checkpoint.pt"
            # One that is older than this run is of another.
            exists = checkpoint.exists() and (options.resume or checkpoint.stat().st_mtime >= begun)
            text = f"to go on from {checkpoint}:\n  {go_on}" if exists else "there is no checkpoint yet"
            print(f"\ninterrupted; {text}", file=sys.stderr)
        return INTERRUPTED
    finally:
        gc.collect()  # DistributedDataParallel holds the group
        group.stop()


def run(options: argparse.Namespace, group: Group, go_on: str) -> int:
    """All of it, by one process of a group. `go_on` is the command for the rest of a run that stops early."""
    started = time.perf_counter()
    try:
        train_frames, valid_frames, test_frames = load_data(options, group)
        data = fingerprint(train_frames, valid_frames, test_frames)
        saved = read_checkpoint(options, data, group) if options.resume else None
        species = {int(number) for frame in train_frames for number in frame.numbers}
        check_species(valid_frames, species, "validation split")
        check_species(test_frames, species, options.test or "test split")
        orders = saved["orders"] if saved else {}
        if options.stress_order == "detect" and not saved:
            orders = detect(options, train_frames, group)
        as_given = test_frames
        train_frames, valid_frames, test_frames = (
            reorder(frames, orders) for frames in (train_frames, valid_frames, test_frames)
        )
        trainer = build(options, train_frames, group)
        if saved:
            trainer.load_state(saved["trainer"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = [
        sum(len(frame.numbers) for frame in frames) for frames in (train_frames, valid_frames, test_frames)
    ]
    tell(
        group,
        f"{len(train_frames)} training, {len(valid_frames)} validation, {len(test_frames)} test structures "
        f"({', '.join(map(str, counts))} atoms), "
        f"{trainer.model.config.num_neighbors:.1f} neighbours per atom, "
        f"{sum(p.numel() for p in trainer.model.parameters())} parameters, "
        f"{group.size} processes of {torch.get_num_threads()} threads",
    )
    without = sum(not frame.has_stress for frame in train_frames)
    if without:
        text = "training structures have no stress (no label, no periodic axis or no volume)"
        tell(group, f"{without} {text}: they count for energy and forces only")
    begun = time.perf_counter()
    finished = train(trainer, valid_frames, options, {"data": data, "orders": orders})
    if not group.leads:
        return 0
    print(f"{time.perf_counter() - begun:.1f} s with validation and checkpoints")
    if not finished:
        print(f"stopped after {trainer.epoch} of {options.epochs} epochs; to go on:\n  {go_on}")
        return 0
    with watch("test, plots and a relaxation"):
        conclude(trainer, train_frames, test_frames, as_given, options)
    if options.profile_layer > 0:
        # Not in a graph, in which operators are not told apart.
        eager = argparse.Namespace(**vars(options) | {"graphs": False})
        share = layer_share(build(eager, train_frames, group), options.profile_layer)
        print("\n" + share_table(share))
        (options.out / "layer_share.json").write_text(json.dumps(share, indent=1))
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a file shows each line when it is printed
    sys.exit(main())
