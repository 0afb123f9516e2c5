"""Two checkouts of diffnl in turns, in one run: what a change costs or saves, row by row.

    git worktree add build/base COMMIT
    (cd build/base && python setup.py -q build_ext --inplace)
    python benchmarks/versus.py --base build/base
    python benchmarks/versus.py --base build/base --device cuda

The steps are those of `neighbors.py`, of this checkout for both: with the plain list, with a `capacity`,
with a `skin` whose candidates are used again, and with a skin that searches. Both versions register their
operators under one name, so each is a process of its own, and one waits while the other is timed. A round
times both, in one order and then in the other. Its ratio is base / new: above 1 the new version is faster. A
row is the median of the ratios of all rounds, with the uncertainty of that median (two standard errors).
Processes start anew several times, for a process keeps its memory's layout, good or bad. Rows that may be
below the limit are measured further. The exit status is 1 if a row is below 0.97 by more than its
uncertainty.

On the CPU a last row compares threads: the list of 60 atoms on two and on one, at most 1.1 of the new
version. On a machine with other work threads wait for each other: there `--threads 1` compares the processor
time of one thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from harness import CUTOFF, is_gpu, label_of, make_system, seconds
from peers import STEPS
from tables import print_table

LEAST = 0.97  # of base / new
MOST = 1.1  # of 60 atoms on two threads over one
SKIN = 1.0  # Å
# The steps of each kind of list.
KINDS = {"plain": STEPS, "capacity": STEPS, "skin": STEPS, "skin, searching": ["list"]}
SIZES = {"cpu": "64,1000,10648,97336,32x64,~10648"}
SIZES["cuda"] = "1000,10648,97336,1000000,512x27,32x1000,~1000,~10648"
SMALL = "60"


# ---- in the process of a version ----


def run_of(kind: str, system):
    """The list of a kind, as `peers.py` has its libraries."""
    import diffnl

    if kind == "capacity":
        rooms = (
            diffnl.estimate_capacity(p.positions, p.cell, p.pbc, CUTOFF, p.system_idx) for p in system.parts
        )
        options = {"capacity": max(rooms)}
    else:
        options = {} if kind == "plain" else {"skin": SKIN}
    layer = diffnl.NeighborList(CUTOFF, **options)

    def run(positions, cell, part, _):
        search = layer if kind != "skin, searching" else diffnl.NeighborList(CUTOFF, **options)
        return search(positions, cell, part.pbc, part.system_idx)[:3]

    return run


def prepare(size: str, kind: str, step: str, dtype: str, device: str):
    """The call to time."""
    system = make_system("64" if size == SMALL else size, getattr(torch, dtype), device)
    if size == SMALL:
        system = replace(system, positions=system.positions[: int(SMALL)])
    return STEPS[step](run_of(kind, system), system)


def processor_seconds(call) -> float:
    """Of this process: what else the machine does is not counted."""
    start = time.process_time()
    call()
    return time.process_time() - start


def sample(call, device: str, budget: float, threads: int, alone: bool) -> float:
    """The lower quartile of the times of the call, `budget` seconds in all, after one to warm up.

    `alone`: processor time instead of the clock's.
    """
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        call()
        times = []
        while not times or (sum(times) < budget and len(times) < 1000):
            times.append(processor_seconds(call) if alone else seconds(call, device))
    finally:
        gc.enable()
    return sorted(times)[len(times) // 4]


def serve() -> None:
    """Answers each line of stdin, {"row": ...} or {"budget": ...}, with a line of JSON."""
    import diffnl

    print(json.dumps(diffnl.__file__), flush=True)
    call, device = None, "cpu"
    for line in sys.stdin:
        order, answer = json.loads(line), None
        if "row" in order:
            call = None
            device = order["device"]
            if is_gpu(device):
                torch.cuda.empty_cache()
            call = prepare(*order["row"], order["dtype"], device)
        else:
            answer = sample(call, device, **order)
        print(json.dumps(answer), flush=True)


class Version:
    """A process that has imported diffnl from a folder, and does what it is asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def check(self) -> None:
        """Waits for the import. Raises ValueError if diffnl came from elsewhere."""
        found = Path(self.answer())
        if not found.is_relative_to(self.folder):
            raise ValueError(f"diffnl comes from {found}, not from {self.folder}")

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a version ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.communicate()


# ---- in the process that compares ----


@dataclass
class Row:
    """What is compared, and in seconds the times of every round: `base` and `new`, or two threads and one."""

    name: tuple[str, str, str]
    base: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [base / new for base, new in zip(self.base, self.new, strict=True)]

    @property
    def noise(self) -> float:
        """Two standard errors of the median, of ratios whose spread is that of their median deviation."""
        deviation = statistics.median(abs(ratio - self.ratio) for ratio in self.ratios)
        return 2 * 1.2533 * 1.4826 * deviation / len(self.ratios) ** 0.5

    def cells(self) -> list[str]:
        times = (f"{1e3 * statistics.median(values):.4g}" for values in (self.base, self.new))
        size, kind, step = self.name
        return [label_of(size), kind, step, *times, f"{self.ratio:.3f}", f"{self.noise:.3f}"]


def measure(row: Row, first, second, rounds: int) -> None:
    """Adds rounds to a row; `first()` and `second()` take a time each, never at the same moment."""
    for turn in range(rounds):
        sides = [(first, row.base), (second, row.new)]
        for time_one, times in sides if turn % 2 == 0 else reversed(sides):
            times.append(time_one())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="a checkout with its extension built in place")
    add("--new", type=Path, default=Path(__file__).resolve().parents[1], help="the other (default: this)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=["float32", "float64"], default="float32")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--sizes", help=f"as in neighbors.py (default: {SIZES['cpu']}; cuda: {SIZES['cuda']})")
    add("--kinds", default=";".join(KINDS), help="with semicolons between (default: all)")
    add("--launches", type=int, default=3, help="of the two processes (default: 3), and as many for doubts")
    add("--rounds", type=int, default=6, help="of a row in each launch (default: 6)")
    add("--budget", type=float, default=0.05, help="seconds of a version in a round (default: 0.05)")
    options = parser.parse_args(arguments)
    options.base, options.new = options.base.resolve(), options.new.resolve()
    options.sizes = (options.sizes or SIZES[torch.device(options.device).type]).split(",")
    options.kinds = options.kinds.split(";")
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"--kinds: {unknown[0]!r} is none of {'; '.join(KINDS)}")
    return options


def launch(rows: list[Row], threads: list[Row], options: argparse.Namespace) -> None:
    """Starts both versions and adds rounds to every row of `rows`, versions compared, and of `threads`."""
    where = {"dtype": options.dtype, "device": options.device}
    alone = options.threads == 1 and not is_gpu(options.device)
    turn = {"budget": options.budget, "threads": options.threads, "alone": alone}
    versions = []
    try:
        for folder in (options.base, options.new):
            versions.append(Version(folder))
        base, new = versions
        for version in versions:
            version.check()
        for row in rows:
            for version in versions:
                version.ask(row=row.name, **where)
            measure(row, lambda: base.ask(**turn), lambda: new.ask(**turn), options.rounds)
            print("  ", *row.cells(), flush=True)
        for row in threads:
            new.ask(row=row.name, **where)
            two, one = (lambda count=count: new.ask(**turn | {"threads": count}) for count in (2, 1))
            measure(row, two, one, 3 * options.rounds)
    finally:
        for version in versions:
            version.stop()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    names = [
        (size, kind, step)
        for size in options.sizes
        for kind in (options.kinds if "~" not in size else ["plain"])
        for step in KINDS[kind]
    ]
    rows = [Row(name) for name in names]
    compares_threads = not is_gpu(options.device) and options.threads > 1
    threads = [Row((SMALL, "plain", "list"))] if compares_threads else []
    print(f"base {options.base}\nnew {options.new}")
    print(f"{options.device}, {options.threads} threads, {options.dtype}", flush=True)
    for number in range(2 * options.launches):
        # After the first launches only what may be on the wrong side of its limit.
        doubtful = number >= options.launches
        again = [row for row in rows if not doubtful or row.ratio - row.noise < LEAST]
        threads_again = [row for row in threads if not doubtful or row.ratio + row.noise > MOST]
        if again or threads_again:
            print(f"launch {number + 1}: {len(again) + len(threads_again)} rows", flush=True)
            launch(again, threads_again, options)
    titles = ["system", "list", "step", "base ms", "new ms", "base / new", "+-"]
    print_table(titles, [row.cells() for row in rows])
    lost = [row for row in rows if row.ratio + row.noise < LEAST]
    for row in lost:
        print(f"slower: {label_of(row.name[0])}, {row.name[1]}, {row.name[2]}: {row.ratio:.3f} < {LEAST}")
    for row in threads:
        slow = row.ratio - row.noise > MOST
        print(
            f"list of {SMALL} atoms, two threads over one: {row.ratio:.3f} +- {row.noise:.3f}"
            + (f", slower than {MOST}" if slow else "")
        )
        lost += [row] * slow
    return 1 if lost else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
