"""Several processes against one: the same losses, and how much faster.

    python benchmarks/processes.py --device cuda --batch-size 4 16 64 -- --train train.extxyz --channels 32

Runs `examples/train_mlip.py` with the options behind `--` as one process and under torch.distributed.run,
for each size of a batch (of all processes together), and compares their `metrics.jsonl`. Exits with status 1
if the training loss of an epoch differs by more than `--tolerance` of itself. Rounding does differ, and many
steps at a high rate amplify it until the runs go their own ways; `--dtype float64` tells that from a mistake.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_mlip.py"


def train(processes: int, out: Path, options: list[str]) -> tuple[list[dict], float]:
    """The rows of metrics.jsonl and structures a second. Raises RuntimeError with the log's end."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log", "w") as log:
        command += [str(EXAMPLE), *options, "--out", str(out)]
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    text = (out / "log").read_text()
    if status:
        raise RuntimeError(f"{processes} processes: exit {status}\n" + "\n".join(text.splitlines()[-30:]))
    rate = float(re.search(r"([\d.]+) structures/s", text)[1])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], rate


def differences(rows: list[dict], others: list[dict]) -> list[float]:
    """Of the training losses of two runs, epoch by epoch, relative."""
    losses = ([row["train"]["loss"] for row in run] for run in (rows, others))
    return [abs(theirs / ours - 1) for ours, theirs in zip(*losses, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=2)
    add("--device", default="cpu")
    add("--batch-size", type=int, nargs="+", default=[4], help="of all processes together")
    add("--epochs", type=int, default=20)
    add("--tolerance", type=float, default=1e-4)
    add("--out", type=Path, default=Path("runs/processes"))
    add("rest", nargs="*", help="options of examples/train_mlip.py, behind --")
    options = parser.parse_args()
    print(
        "batch  structures/s of 1",
        f"{f'of {options.processes}':>8}   ratio  loss differs by  epochs within {options.tolerance:g}",
    )
    same = True
    for size in options.batch_size:
        run = [*options.rest, "--device", options.device, "--epochs", str(options.epochs), "--every", "1"]
        run += ["--batch-size", str(size), "--relax-steps", "1"]
        (rows, one), (others, several) = (
            train(count, options.out / f"{size}x{count}", run) for count in (1, options.processes)
        )
        off = differences(rows, others)
        within = next((k for k, value in enumerate(off) if value > options.tolerance), len(off))
        same &= within == len(off)
        print(
            f"{size:>5}  {one:>17.0f} {several:>8.0f} {several / one:>6.2f}x  {max(off):>15.1e}"
            f"  {within:>6} of {len(off)}",
            flush=True,
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
