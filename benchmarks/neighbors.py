"""Times and peak memory of diffnl beside other neighbour lists, all on the same systems in one run.

    python benchmarks/neighbors.py --threads 2 --json neighbors.json --plot neighbors.png
    python benchmarks/neighbors.py --device cuda

The workload: jittered, shuffled, periodic lattices with 0.1 atoms/Å³ and a 6 Å cutoff (about 90 neighbours
an atom), as cubic boxes (`--sizes`) and batches of triclinic boxes (`--batches`). Four steps, each for the
full list:

    list      pairs and integer shifts
    vectors   the list with vectors that can be differentiated to positions and cell
    backward  gradients to positions and cell of a weighted sum of the vectors
    train     vectors, the energy sum of 1/sqrt(d² + 1), its gradients, and the gradients of a loss on those

Before a row is timed all libraries must find the same number of pairs. Times are medians after a warm-up; the
libraries take turns. Peak memory is what a step adds to what was there before, results included, on the CPU
measured in a fresh process for each library and system. That of the train step holds the intermediates of the
energy too, which are the same for all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from harness import CUTOFF, DENSITY, RESOLUTION_MB, System, describe, machine, make_system, time_in_turns
from peers import GATHERS, LIBRARIES, STEPS, load, peak_memory

SIZES = {"cpu": "64,1000,10648,97336", "cuda": "1000,10648,97336,1000000"}
BATCHES = {"cpu": "", "cuda": "64x64,512x64,512x27,32x1000"}
MEMORY_STEPS = ["vectors", "backward", "train"]
COLUMNS = [f"{step}_ms" for step in STEPS] + [f"{step}_mb" for step in MEMORY_STEPS]


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


def measure(size: str, runs: dict, options: argparse.Namespace) -> list[dict]:
    """One row a library for the system `size`: counts checked first, then times, then peak memory."""
    dtype = getattr(torch, options.dtype)
    system = make_system(size, dtype, options.device, options.seed)
    print(f"\n{system.label}: {system.atoms:,} atoms, {options.dtype}")
    counts, notes = {}, {}
    for name, run in runs.items():
        notes[name] = LIBRARIES[name].refusal(system)
        if notes[name] is None:
            try:
                counts[name] = int(run(system.positions, system.cell, system, False)[0].shape[1])
            except Exception as error:  # a peer may fail in any way; the others go on
                notes[name] = f"failed: {describe(error)}"
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
        calls = {name: lambda run=runs[name], prepare=prepare: prepare(run, system) for name in accepted}
        times, errors = time_in_turns(calls, options.device, options.budget)
        for name, samples in times.items():
            rows[name][f"{step}_ms"] = statistics.median(samples) * 1e3
            rows[name][f"{step}_repeats"] = len(samples)
        for name, message in errors.items():
            notes[name] = "; ".join(filter(None, [notes[name], f"{step} failed: {message}"]))
    for name in accepted if options.memory else []:
        try:
            peaks = peak_memory(
                name,
                MEMORY_STEPS,
                size,
                dtype=dtype,
                device=options.device,
                gather=options.gather,
                seed=options.seed,
                threads=options.threads,
            )
            rows[name] |= {f"{step}_mb": peak for step, peak in peaks.items()}
        except Exception as error:  # the same for its memory
            notes[name] = "; ".join(filter(None, [notes[name], f"memory failed: {describe(error)}"]))
    return [row | {"note": notes[name]} for name, row in rows.items()]


def compare(rows: list[dict]) -> dict | None:
    """The best peer over diffnl in each column of one system's rows; None without diffnl's row.

    For each column `{"ratio", "peer", "at_least"}`, or None where there is nothing to compare. A memory of
    diffnl below the resolution counts as the resolution: the ratio is then at least that.
    """
    own = next((row for row in rows if row["library"] == "diffnl" and row["pairs"] is not None), None)
    if own is None:
        return None
    ratios: dict = {"system": own["system"]}
    for column in COLUMNS:
        peers = [row for row in rows if row is not own and row[column] is not None]
        best = min(peers, key=lambda row: row[column], default=None)
        ratios[column] = None
        if best is None or own[column] is None:
            continue
        mine, floor = own[column], RESOLUTION_MB if column.endswith("_mb") else 0.0
        if best[column] > floor:
            ratios[column] = {
                "ratio": best[column] / max(mine, floor),
                "peer": best["library"],
                "at_least": mine < floor,
            }
    return ratios


def show(value: float | None, column: str) -> str:
    """A time in ms or a memory in MB with three significant digits."""
    if value is None:
        return "-"
    if column.endswith("_mb") and value < RESOLUTION_MB:
        return f"<{RESOLUTION_MB}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def title_of(column: str) -> str:
    """ "train_mb" as "train MB"."""
    return column.replace("_ms", " ms").replace("_mb", " MB")


def print_table(titles: list[str], lines: list[list[str]]) -> None:
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    for line in [titles, *lines]:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([f"  {line[0]:<{widths[0]}}", *cells]))


def print_rows(rows: list[dict]) -> None:
    titles = ["library", *map(title_of, COLUMNS)]
    lines = [[row["library"], *(show(row[column], column) for column in COLUMNS)] for row in rows]
    print_table(titles, lines)
    for row in rows:
        if row["note"]:
            print(f"  {row['library']}: {row['note']}")
    sys.stdout.flush()


def print_summary(comparisons: list[dict]) -> None:
    """The ratio of the best peer to diffnl, system by system."""
    print("\nBest peer / diffnl: above 1, diffnl is that many times faster or smaller")
    lines = []
    for ratios in comparisons:
        line = [ratios["system"]]
        for column in COLUMNS:
            cell = ratios[column]
            sign = ">" if cell and cell["at_least"] else ""
            line.append(f"{sign}{cell['ratio']:.1f}x {cell['peer']}" if cell else "-")
        lines.append(line)
    print_table(["system", *map(title_of, COLUMNS)], lines)


def spread(heights: list[float], gap: float, top: float) -> list[float]:
    """Moves sorted label heights apart until neighbours are `gap` from each other and none is above `top`."""
    placed = list(heights)
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap)
    ceiling = top
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    return placed


def leader(color) -> dict:
    """The thin line from the end of a curve to the left edge of its label."""
    return {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)}


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Log-log PNG over the atoms of the single boxes: a panel a column, a labelled line a library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    boxes = [row for row in rows if row["system"].startswith("bulk")]
    columns = [column for column in COLUMNS if any(row[column] is not None for row in boxes)]
    across = math.ceil(len(columns) / 2)
    down = math.ceil(len(columns) / across)
    figure, panels = plt.subplots(down, across, figsize=(4.8 * across, 4.2 * down), squeeze=False)
    colors = dict(zip(LIBRARIES, ["black", *plt.get_cmap("tab10").colors], strict=False))
    for panel, column in zip(panels.flat, columns, strict=False):
        ends = []
        for name, color in colors.items():
            lines = [row for row in boxes if row["library"] == name and row[column] is not None]
            points = sorted((row["atoms"], row[column]) for row in lines)
            if column.endswith("_mb"):
                points = [point for point in points if point[1] >= RESOLUTION_MB]
            if points:
                width = 2.6 if name == "diffnl" else 1.4
                order = 3 if name == "diffnl" else 2
                style = {"linewidth": width, "markersize": 4, "zorder": order}
                panel.loglog(*zip(*points, strict=True), "o-", color=color, **style)
                ends.append((math.log10(points[-1][1]), points[-1], name))
        step, unit = column.split("_")
        panel.set(title=step if unit == "ms" else f"{step}: peak memory", xlabel="atoms")
        panel.set_ylabel("time (ms)" if unit == "ms" else "peak memory growth (MB)")
        panel.grid(True, which="major", alpha=0.3)
        low, high = panel.get_xlim()
        panel.set_xlim(low, high * (high / low) ** 0.35)  # room for the labels inside the frame
        ends.sort()
        bottom, top = (math.log10(limit) for limit in panel.get_ylim())
        gap = 0.055 * (top - bottom)
        heights = spread([end[0] for end in ends], gap, top - gap)
        for height, (_, (atoms, value), name) in zip(heights, ends, strict=True):
            weight = "bold" if name == "diffnl" else "normal"
            panel.annotate(
                name,
                (atoms, value),
                (high * (high / low) ** 0.04, 10**height),
                color=colors[name],
                fontsize=9,
                fontweight=weight,
                verticalalignment="center",
                arrowprops=leader(colors[name]),
            )
    for panel in panels.flat[len(columns) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers = [name for name in LIBRARIES if name != "diffnl"]
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--dtype", choices=["float32", "float64"], default="float32")
    add("--sizes", help=f"atoms a box, cubes (default: {SIZES['cpu']}; cuda: {SIZES['cuda']})")
    add("--batches", help=f"boxes x atoms, like 512x27 (default: none; cuda: {BATCHES['cuda']})")
    add("--peers", help=f"which of {','.join(peers)} (default: all that know the device)")
    add("--gather", choices=list(GATHERS), default="indexing", help="how plain torch vectors gather")
    add("--budget", type=float, default=1.0, help="seconds a step of a library and system (default: 1)")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all numbers to this file")
    add("--plot", type=Path, help="write a PNG of time over atoms to this file")
    options = parser.parse_args(arguments)
    kind = torch.device(options.device).type
    if kind not in SIZES:
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    sizes = SIZES[kind] if options.sizes is None else options.sizes
    batches = BATCHES[kind] if options.batches is None else options.batches
    options.systems = [size.strip() for size in f"{sizes},{batches}".split(",") if size.strip()]
    if options.peers is None:
        options.peers = [name for name in peers if kind in LIBRARIES[name].devices]
    else:
        options.peers = [name for name in options.peers.split(",") if name]
    unknown = [name for name in options.peers if name not in peers]
    if unknown:
        parser.error(f"--peers must be some of {','.join(peers)}, got {','.join(unknown)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    runs, versions, missing = load(["diffnl", *options.peers], options.gather)
    where = machine(options.device, options.threads)
    print(f"{where['device']}, {options.threads} threads, torch {where['torch']}, Python {where['python']}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")
    rows, comparisons = [], []
    for size in options.systems:
        measured = measure(size, runs, options)
        print_rows(measured)
        rows += measured
        comparisons += filter(None, [compare(measured)])
    if comparisons:
        print_summary(comparisons)
    if options.json:
        settings = {
            "cutoff_angstrom": CUTOFF,
            "dtype": options.dtype,
            "gather": options.gather,
            "budget_s": options.budget,
            "seed": options.seed,
        }
        record = {
            "machine": where,
            "versions": versions,
            "missing": missing,
            "settings": settings,
            "rows": rows,
            "best_peer_over_diffnl": comparisons,
        }
        options.json.write_text(json.dumps(record, indent=1))
    if options.plot:
        settings = f"{options.threads} threads, {options.dtype}, {CUTOFF} Å, {DENSITY} atoms/Å³"
        plot(rows, f"{where['device']}, torch {where['torch']}, {settings}", options.plot)
    healthy = [row for row in rows if row["library"] == "diffnl" and not row["note"]]
    return 0 if "diffnl" in missing or len(healthy) == len(options.systems) else 1


if __name__ == "__main__":
    sys.exit(main())
