"""Time and memory a pair from 10^3 to 10^6 atoms, and the speed-up of threads.

    python benchmarks/scaling.py --threads 1,2 --json scaling.json --plot scaling.png

The systems and the steps are those of neighbors.py: `vectors` searches and writes differentiable vectors,
`backward` turns a gradient of the vectors into gradients of positions and cell. A search that is linear in
the atoms takes the same time a pair at every size. Times are medians; thread counts take turns. Memory is
what a step adds to the peak of a fresh process, its results included.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from harness import (
    CUTOFF,
    DENSITY,
    MEGABYTE,
    RESOLUTION_MB,
    available_memory_mb,
    machine,
    make_system,
    time_in_turns,
)
from peers import LIBRARIES, STEPS, load, peak_memory
from tables import leader, print_table, spread

SIZES = "1000,4096,10648,32768,97336,314432,1000000"
TIMED = ["vectors", "backward"]
REFERENCE_ATOMS = 10_000  # times are also given relative to the size nearest to this
BYTES_A_PAIR = 120  # enough for the list, its vectors, their gradient and its temporaries


def fits(size: str) -> bool:
    """Whether a system of `size` atoms surely fits into the memory that is free."""
    pairs = int(size) * DENSITY * 4 / 3 * math.pi * CUTOFF**3
    return pairs * BYTES_A_PAIR / MEGABYTE < available_memory_mb()


def measure(size: str, run, options: argparse.Namespace) -> list[dict]:
    """One row a step and thread count for the box of `size` atoms."""
    dtype = getattr(torch, options.dtype)
    system = LIBRARIES[options.library].view(make_system(size, dtype, options.device, options.seed))
    pairs = int(run(system.positions, system.cell, system, False)[0].shape[1])
    peaks = dict.fromkeys(TIMED)
    if options.memory:
        peaks = peak_memory(
            options.library,
            dict.fromkeys(TIMED, LIBRARIES[options.library].ways[-1]),
            size,
            dtype=dtype,
            device=options.device,
            seed=options.seed,
            threads=max(options.threads),
        )
    rows = []
    for step in TIMED:

        def prepare(threads: int, step: str = step):
            torch.set_num_threads(threads)
            return STEPS[step](run, system)

        calls = {str(threads): lambda threads=threads: prepare(threads) for threads in options.threads}
        times, errors = time_in_turns(calls, options.device, options.budget)
        if errors:
            raise RuntimeError(f"{step} failed on {system.label}: {errors}")
        for threads, samples in times.items():
            median = statistics.median(samples)
            rows.append(
                {
                    "atoms": system.atoms,
                    "pairs": pairs,
                    "step": step,
                    "threads": int(threads),
                    "ms": median * 1e3,
                    "ns_per_pair": median * 1e9 / pairs,
                    "repeats": len(samples),
                    "peak_mb": peaks[step],
                    "bytes_per_pair": None if peaks[step] is None else peaks[step] * MEGABYTE / pairs,
                }
            )
    return rows


def add_ratios(rows: list[dict]) -> None:
    """Adds time a pair relative to the size nearest 10^4 atoms, and speed-up over the fewest threads."""
    reference = min({row["atoms"] for row in rows}, key=lambda atoms: abs(atoms - REFERENCE_ATOMS))
    fewest = min(row["threads"] for row in rows)
    at = {(row["atoms"], row["step"], row["threads"]): row["ns_per_pair"] for row in rows}
    for row in rows:
        row["reference_atoms"] = reference
        row["ratio_to_reference"] = row["ns_per_pair"] / at[reference, row["step"], row["threads"]]
        row["speedup"] = at[row["atoms"], row["step"], fewest] / row["ns_per_pair"]


def print_rows(rows: list[dict], threads: list[int]) -> None:
    """A table a step: time a pair and its ratio for each thread count, speed-up, bytes a pair."""
    for step in TIMED:
        reference = rows[0]["reference_atoms"]
        titles = ["atoms", "pairs"]
        for count in threads:
            titles += [f"ns/pair, {count} thr", f"to {reference:,}"]
        titles += [f"speed-up, {count} thr" for count in threads[1:]] + ["peak bytes/pair"]
        lines = []
        for atoms in sorted({row["atoms"] for row in rows}):
            here = {row["threads"]: row for row in rows if row["atoms"] == atoms and row["step"] == step}
            first = here[threads[0]]
            line = [f"{atoms:,}", f"{first['pairs']:,}"]
            for count in threads:
                line += [f"{here[count]['ns_per_pair']:.2f}", f"{here[count]['ratio_to_reference']:.2f}x"]
            line += [f"{here[count]['speedup']:.2f}x" for count in threads[1:]]
            if first["peak_mb"] is None:
                line.append("-")
            elif first["peak_mb"] < RESOLUTION_MB:
                line.append(f"<{RESOLUTION_MB} MB in all")
            else:
                line.append(f"{first['bytes_per_pair']:.1f}")
            lines.append(line)
        print(f"\n{step}")
        print_table(titles, lines)


def plot(rows: list[dict], title: str, path: Path) -> None:
    """PNG over the number of atoms: time a pair of each step and thread count, and peak bytes a pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves: dict[str, dict[str, list]] = {"time a pair (ns)": {}, "peak memory growth (bytes a pair)": {}}
    times, memory = curves.values()
    for row in rows:
        name = f"{row['step']}, {row['threads']} thr"
        times.setdefault(name, []).append((row["atoms"], row["ns_per_pair"]))
        if row["peak_mb"] is not None and row["peak_mb"] >= RESOLUTION_MB:
            points = memory.setdefault(row["step"], [])
            if (row["atoms"], row["bytes_per_pair"]) not in points:
                points.append((row["atoms"], row["bytes_per_pair"]))
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6))
    for panel, (label, lines) in zip(panels, curves.items(), strict=True):
        ends = []
        for name, points in lines.items():
            points = sorted(points)
            color = {"vectors": "tab:blue", "backward": "tab:red"}[name.split(",")[0]]
            style = "o-" if name.endswith(f" {rows[0]['threads']} thr") or "," not in name else "s--"
            panel.plot(*zip(*points, strict=True), style, color=color, markersize=4)
            ends.append((points[-1][1], points[-1], name, color))
        panel.set(xscale="log", xlabel="atoms", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.3)
        low, high = panel.get_xlim()
        panel.set_xlim(low, high * (high / low) ** 0.35)  # room for the labels inside the frame
        ends.sort()
        top = panel.get_ylim()[1]
        heights = spread([end[0] for end in ends], 0.055 * top, 0.95 * top)
        for height, (_, point, name, color) in zip(heights, ends, strict=True):
            place = (high * (high / low) ** 0.03, height)
            style = {"color": color, "fontsize": 9, "verticalalignment": "center"}
            panel.annotate(name, point, place, arrowprops=leader(color), **style)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", default="1,2", help="CPU thread counts, the smallest is the base (default: 1,2)")
    add("--dtype", choices=["float32", "float64"], default="float32")
    add("--sizes", default=SIZES, help=f"atoms a box, cubes (default: {SIZES})")
    add("--library", choices=list(LIBRARIES), default="diffnl", help="what to measure (default: diffnl)")
    add("--budget", type=float, default=3.0, help="seconds a step, size and thread count (default: 3)")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all numbers to this file")
    add("--plot", type=Path, help="write a PNG to this file")
    options = parser.parse_args(arguments)
    options.threads = sorted(int(count) for count in options.threads.split(","))
    if torch.device(options.device).type != "cpu":
        options.threads = options.threads[:1]  # a GPU does not care
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    runs, versions, missing = load([options.library])
    if missing:
        print(f"missing: {options.library} ({missing[options.library]})", file=sys.stderr)
        return 1
    where = machine(options.device, max(options.threads))
    library = f"{options.library} {versions[options.library]}"
    title = f"{library}, {where['device']}, torch {where['torch']}, {options.dtype}, {CUTOFF} Å"
    print(title)
    rows, skipped = [], []
    for size in options.sizes.split(","):
        if not fits(size):
            skipped.append(int(size))
            print(f"skipped: {int(size):,} atoms do not surely fit into the free memory")
            continue
        rows += measure(size, runs[options.library][LIBRARIES[options.library].ways[-1]], options)
        print(f"measured {int(size):,} atoms", flush=True)
    if not rows:
        return 1
    add_ratios(rows)
    print_rows(rows, options.threads)
    if options.json:
        settings = {"cutoff_angstrom": CUTOFF, "dtype": options.dtype, "budget_s": options.budget}
        record = {
            "machine": where,
            "versions": versions,
            "settings": settings | {"seed": options.seed, "threads": options.threads},
            "rows": rows,
            "skipped_atoms": skipped,
        }
        options.json.write_text(json.dumps(record, indent=1))
    if options.plot:
        plot(rows, title, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
