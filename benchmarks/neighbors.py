"""Times and peak memory of diffnl beside other neighbour lists, all on the same systems in one run.

    python benchmarks/neighbors.py --threads 2 --json neighbors.json --plot neighbors.png
    python benchmarks/neighbors.py --device cuda --json neighbors.json

The workload: jittered, shuffled, periodic lattices with 0.1 atoms/Å³ and a 6 Å cutoff (about 90 neighbours
an atom), as cubic boxes (`--sizes`) and batches of triclinic boxes (`--batches`). "~10648" among the sizes is
a box whose density changes from call to call, fourfold at most: its rows are means over four densities, and
nothing that a library has learnt in a call holds in the next. Four steps, each for the full list:

    list      pairs and integer shifts
    vectors   the list with vectors that can be differentiated to positions and cell
    backward  gradients to positions and cell of a weighted sum of the vectors
    train     vectors, the energy sum of 1/sqrt(d² + 1), its gradients, and the gradients of a loss on those

Libraries without differentiable vectors of their own get them from plain torch, once with indexing and once
with `index_select`; of the two the faster one in a step counts, and is named.

Before a row is timed all libraries must find the same number of pairs. Times are medians after a warm-up, by
events on a GPU; the libraries take turns. Peak memory is what a step adds to what was there before, results
included, on the CPU measured in a fresh process for each library and system. That of the train step holds the
intermediates of the energy too, which are the same for all. On a GPU `train peak` is the same with the
inputs, by torch's allocator; what a library takes from the device around that allocator is noted, not
compared.

On a GPU the run also measures the speed of a copy and sets times against it, checks that results repeat to
the bit, and (float32) times a box of 10⁷ atoms (`bandwidth.py`). With `--json` the file is written after
every row, and `--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import bandwidth
import torch
from harness import (
    CUTOFF,
    DENSITY,
    DeviceLost,
    System,
    is_gpu,
    label_of,
    machine,
    make_system,
    survive,
    time_in_turns,
)
from peers import LIBRARIES, OWN, STEPS, gpu_memory, load, peak_memory
from tables import (
    COLUMNS,
    MEMORY_STEPS,
    compare,
    fastest_way,
    plot,
    print_rows,
    print_summary,
    title_of_record,
)

SIZES = {"cpu": "64,1000,10648,97336,~10648", "cuda": "1000,10648,97336,1000000,~1000,~10648"}
BATCHES = {"cpu": "", "cuda": "512x27,512x64,32x1000"}
BUDGETS = {"cpu": 1.0, "cuda": 0.5}
REPEATS_SIZE = "1000000"
SLOW_S = 5.0  # a first call above it is told: some libraries compile their kernels in it
LOST = 3  # exit status where a library took the GPU with it; --resume without that library goes on


def rounding_tolerance(system: System, pairs: int) -> int:
    """How many pairs two right libraries may differ by in float32; none in float64.

    A library that computes in another precision sees |v| off by up to delta, a few ulps of the box length,
    so it can disagree on pairs in a shell of that thickness at the cutoff: a fraction 3 delta / cutoff of
    all pairs. Always an even number, because a full list gains and loses pairs by twos.
    """
    if system.positions.dtype == torch.float64 or not system.atoms:
        return 0
    length = float(system.positions.abs().max()) + CUTOFF
    delta = 4 * torch.finfo(torch.float32).eps * length
    return 2 * math.ceil(pairs * 3 * delta / CUTOFF / 2)


def judge_counts(counts: dict[str, int], system: System) -> tuple[int, dict[str, str]]:
    """The number of pairs that most libraries agree on, and the reason by name for those that are refused.

    Between two equally common answers the earlier library's counts, diffnl's before all.
    """

    def agree(a: int, b: int) -> bool:
        return abs(a - b) <= rounding_tolerance(system, max(a, b))

    expected = max(counts.values(), key=lambda count: sum(agree(count, other) for other in counts.values()))
    refused = {
        name: f"refused: {count:,} pairs where the others find {expected:,}"
        for name, count in counts.items()
        if not agree(count, expected)
    }
    return expected, refused


def count_pairs(runs: dict, views: dict[str, System], device: str) -> tuple[dict[str, int], dict]:
    """The number of pairs each library finds, by name, and the reason by name of those without one."""
    counts, notes = {}, {}
    for name, ways in runs.items():
        system, run = views[name], next(iter(ways.values()))
        notes[name] = LIBRARIES[name].refusal(system)
        if notes[name] is not None:
            continue
        start = time.perf_counter()
        try:
            found = (run(part.positions, part.cell, part, False)[0] for part in system.parts)
            counts[name] = sum(int(mapping.shape[1]) for mapping in found)
        except Exception as error:  # a peer may fail in any way; the others go on
            notes[name] = f"failed: {survive(name, error, device)}"
        if time.perf_counter() - start > SLOW_S:
            print(f"  {name}: {time.perf_counter() - start:.0f} s for the first call", flush=True)
    return counts, notes


def measure(size: str, runs: dict, options: argparse.Namespace) -> list[dict]:
    """One row a library for the system `size`: counts checked first, then times, then peak memory."""
    dtype = getattr(torch, options.dtype)
    system = make_system(size, dtype, options.device, options.seed)
    views = {name: LIBRARIES[name].view(system) for name in runs}
    print(f"\n{system.label}: {system.atoms:,} atoms, {options.dtype}", flush=True)
    counts, notes = count_pairs(runs, views, options.device)
    if counts:
        expected, refused = judge_counts(counts, system)
        notes |= refused
        tolerance = rounding_tolerance(system, expected)
        print(f"  {expected:,} pairs")
        for name, count in counts.items():
            if name not in refused and count != expected:
                difference = f"{count - expected:+d} pairs by rounding at the cutoff"
                print(f"  {name}: {difference} (allowed: {tolerance})")
    rows = {
        name: {"system": system.label, "atoms": system.atoms, "library": name, "pairs": counts.get(name)}
        | dict.fromkeys(COLUMNS)
        for name in runs
    }
    accepted = [name for name in counts if notes[name] is None]
    for step, prepare in STEPS.items():
        calls = {
            f"{name}/{way}": lambda run=run, view=views[name], prepare=prepare: prepare(run, view)
            for name in accepted
            for way, run in list(runs[name].items())[: 1 if step == "list" else None]
        }
        times, errors = time_in_turns(calls, options.device, options.budget)
        medians = {entry: statistics.median(samples) for entry, samples in times.items()}
        for entry in sorted(medians, key=medians.get, reverse=True):  # the fastest way of a library is last
            name, way = entry.split("/")
            rows[name][f"{step}_ms"] = medians[entry] * 1e3 / len(system.parts)
            rows[name][f"{step}_repeats"] = len(times[entry])
            rows[name].setdefault(f"{step}_ways", {})[way] = rows[name][f"{step}_ms"]
        for entry, message in errors.items():
            name, way = entry.split("/")
            notes[name] = "; ".join(filter(None, [notes[name], f"{step} failed ({way}): {message}"]))
    for name in accepted if options.memory else []:
        try:
            rows[name] |= memory_columns(rows[name], views[name], size, options)
        except Exception as error:  # the same for its memory
            message = survive(name, error, options.device)
            notes[name] = "; ".join(filter(None, [notes[name], f"memory failed: {message}"]))
    if is_gpu(options.device):
        torch.cuda.empty_cache()
    return [row | {"note": notes[name]} for name, row in rows.items()]


def memory_columns(row: dict, view: System, size: str, options: argparse.Namespace) -> dict:
    """Peak memory of a library on a system, of the faster way in each step, as columns of its `row`."""
    name, every = row["library"], LIBRARIES[row["library"]].ways
    ways = {step: fastest_way(row, step) or every[0] for step in MEMORY_STEPS}
    if is_gpu(options.device):
        return gpu_memory(name, ways, view)
    peaks = peak_memory(
        name,
        ways,
        size,
        dtype=view.positions.dtype,
        device=options.device,
        seed=options.seed,
        threads=options.threads,
    )
    return {f"{step}_mb": peak for step, peak in peaks.items()}


def gpu_extras(run, options: argparse.Namespace, record: dict) -> None:
    """Adds to `record` what is measured of diffnl alone: the speed of a copy, repeatability, 10⁷ atoms."""

    def repeats() -> dict:
        dtype = getattr(torch, options.dtype)
        return bandwidth.repeats_itself(run, make_system(REPEATS_SIZE, dtype, options.device, options.seed))

    extras = {"bandwidth": lambda: bandwidth.copy_bandwidth(options.device)}
    if run is not None:
        extras["repeats"] = repeats
        if options.large:
            extras["large"] = lambda: bandwidth.time_a_pair(run, options.device, options.seed)
    for key, measure_it in extras.items():
        if record[key] is not None:
            continue
        try:
            record[key] = measure_it()
        except Exception as error:  # a card too small for 10⁷ atoms still runs the rows
            print(f"{key} failed: {survive('diffnl', error, options.device)}")
        torch.cuda.empty_cache()
    if record["repeats"]:
        search, backward = (record["repeats"][key] for key in ("search", "backward"))
        print(f"the same bits twice at {REPEATS_SIZE} atoms: search {search}, backward {backward}")
    if record["large"]:
        bandwidth.print_large(record["large"])
    sys.stdout.flush()


def floors_of(measured: list[dict], options: argparse.Namespace, record: dict) -> list[dict]:
    """Floors of one system's row of diffnl, where the speed of a copy is known."""
    own = [row for row in measured if row["library"] == "diffnl" and row["vectors_ms"] is not None]
    own = [row for row in own if not row["system"].startswith("changing")]
    if not own or record["bandwidth"] is None:
        return []
    try:
        dtype = getattr(torch, options.dtype)
        return [bandwidth.floors(own[0], dtype, record["bandwidth"], options.device)]
    except Exception as error:  # the floor of the train step takes memory
        print(f"floor failed: {survive('torch', error, options.device)}")
        return []


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers = [name for name in LIBRARIES if name != "diffnl"]
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--dtype", choices=["float32", "float64"], default="float32")
    add("--sizes", help=f"atoms a box, cubes; ~: changing (default: {SIZES['cpu']}; cuda: {SIZES['cuda']})")
    add("--batches", help=f"boxes x atoms, like 512x27 (default: none; cuda: {BATCHES['cuda']})")
    add("--peers", help=f"which of {','.join(peers)} (default: all that know the device)")
    add("--without", default="", help="peers to leave out")
    add("--budget", type=float, help="seconds a step of a library and system (default: 1; cuda: 0.5)")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    add("--extras", action=argparse.BooleanOptionalAction, default=True, help="floors, repeats (cuda)")
    add("--large", action=argparse.BooleanOptionalAction, default=True, help="10⁷ atoms (cuda, float32)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all numbers to this file, after every row")
    add("--resume", action="store_true", help="keep the rows that are in the --json file already")
    add("--plot", type=Path, help="write a PNG of time over atoms to this file")
    options = parser.parse_args(arguments)
    kind = torch.device(options.device).type
    if kind not in SIZES:
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    sizes = SIZES[kind] if options.sizes is None else options.sizes
    batches = BATCHES[kind] if options.batches is None else options.batches
    options.systems = [size.strip() for size in f"{sizes},{batches}".split(",") if size.strip()]
    options.budget = BUDGETS[kind] if options.budget is None else options.budget
    options.extras = options.extras and kind == "cuda"
    options.large = options.large and options.dtype == "float32"
    if options.peers is None:
        options.peers = [name for name in peers if kind in LIBRARIES[name].devices]
    else:
        options.peers = [name for name in options.peers.split(",") if name]
    without = [name for name in options.without.split(",") if name]
    unknown = [name for name in [*options.peers, *without] if name not in peers]
    if unknown:
        parser.error(f"--peers must be some of {','.join(peers)}, got {','.join(unknown)}")
    options.peers = [name for name in options.peers if name not in without]
    if options.resume and not options.json:
        parser.error("--resume needs --json")
    return options


def new_record(options: argparse.Namespace, versions: dict, missing: dict) -> dict:
    """What the JSON file holds, before the first row."""
    return {
        "machine": machine(options.device, options.threads),
        "versions": versions,
        "missing": missing,
        "settings": {
            "cutoff_angstrom": CUTOFF,
            "density_per_cubic_angstrom": DENSITY,
            "dtype": options.dtype,
            "budget_s": options.budget,
            "seed": options.seed,
        },
        "bandwidth": None,
        "repeats": None,
        "large": None,
        "lost_to": [],
        "rows": [],
        "floors": [],
        "best_peer_over_diffnl": [],
    }


def take_up(record: dict, path: Path) -> None:
    """Adds the results in `path` to `record`. Raises ValueError if they come from another kind of run."""
    saved = json.loads(path.read_text())
    for key in ("settings", "machine"):
        if saved[key] != record[key]:
            raise ValueError(f"--resume: {path} has other {key}: {saved[key]}, not {record[key]}")
    for key in ("bandwidth", "repeats", "large", "lost_to", "rows", "floors", "best_peer_over_diffnl"):
        record[key] = saved[key]
    # A library left out now may be the one that wrote some of the rows.
    record["versions"] = saved["versions"] | record["versions"]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if is_gpu(options.device) and not torch.cuda.is_available():
        print(f"--device {options.device}: this torch finds no GPU", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if is_gpu(options.device) and torch.device(options.device).index is not None:
        torch.cuda.set_device(options.device)
    runs, versions, missing = load(["diffnl", *options.peers])
    record = new_record(options, versions, missing)
    if options.resume and options.json.exists():
        take_up(record, options.json)
    where = record["machine"]
    print(f"{where['device']}, {options.threads} threads, torch {where['torch']}, Python {where['python']}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(record, indent=1))

    try:
        if options.extras:
            gpu_extras(runs.get("diffnl", {}).get(OWN), options, record)
            save()
        done = {row["system"] for row in record["rows"]}
        for size in options.systems:
            if label_of(size) in done:
                continue
            measured = measure(size, runs, options)
            print_rows(measured)
            record["rows"] += measured
            record["best_peer_over_diffnl"] += filter(None, [compare(measured)])
            save()
            record["floors"] += floors_of(measured, options, record)
            save()
    except DeviceLost as lost:
        record["lost_to"].append(lost.name.partition("/")[0])
        save()
        print(lost)
        return LOST
    if record["floors"]:
        bandwidth.print_floors(record["floors"], record["bandwidth"])
    if record["best_peer_over_diffnl"]:
        print_summary(record["best_peer_over_diffnl"])
    if options.plot:
        plot(record["rows"], title_of_record(record), options.plot)
    healthy = {row["system"] for row in record["rows"] if row["library"] == "diffnl" and not row["note"]}
    return 0 if "diffnl" in missing or len(healthy) >= len(options.systems) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status == LOST:
        os._exit(status)  # with the GPU gone, destructors that free its memory would abort
    sys.exit(status)
