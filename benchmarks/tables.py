"""How the benchmarks show their rows: ratios, tables on the terminal, a log-log plot."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from harness import RESOLUTION_MB
from peers import LIBRARIES, STEPS

MEMORY_STEPS = ["vectors", "backward", "train"]
# What diffnl is compared in. `train_peak_mb` is known on a GPU only: what torch's allocator holds at the
# worst moment, the inputs included, where `train_mb` leaves them out.
COLUMNS = [f"{step}_ms" for step in STEPS] + [f"{step}_mb" for step in MEMORY_STEPS] + ["train_peak_mb"]


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


def fastest_way(row: dict, step: str) -> str | None:
    """The way that the time of a row's step belongs to."""
    ways = row.get(f"{step}_ways")
    return min(ways, key=ways.get) if ways else None


def chosen_ways(row: dict) -> str | None:
    """Where there are two ways to the vectors, the faster one in each step and the other's time over its."""
    found = []
    for step in STEPS:
        ways = sorted((row.get(f"{step}_ways") or {}).items(), key=lambda item: item[1])
        if len(ways) > 1:
            (best, time), (other, longer) = ways[:2]
            found.append(f"{step} by {best} ({other}: {longer / time:.2f}x)")
    return ", ".join(found) or None


def show(value: float | None, column: str) -> str:
    """A time in ms or a memory in MB with three significant digits."""
    if value is None:
        return "-"
    if column.endswith("_mb") and value < RESOLUTION_MB:
        return f"<{RESOLUTION_MB}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def title_of(column: str) -> str:
    """ "train_mb" as "train MB"."""
    return column.replace("_ms", " ms").replace("_mb", " MB").replace("_", " ")


def filled(columns: list[str], rows: list[dict]) -> list[str]:
    """The columns in which some row has something."""
    return [column for column in columns if any(row.get(column) is not None for row in rows)]


def print_table(titles: list[str], lines: list[list[str]]) -> None:
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    for line in [titles, *lines]:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([f"  {line[0]:<{widths[0]}}", *cells]))


def print_rows(rows: list[dict]) -> None:
    columns = filled(COLUMNS, rows)
    titles = ["library", *map(title_of, columns)]
    lines = [[row["library"], *(show(row[column], column) for column in columns)] for row in rows]
    print_table(titles, lines)
    for row in rows:
        for line in filter(None, (row["note"], chosen_ways(row))):
            print(f"  {row['library']}: {line}")
        outside = row.get("train_outside_mb") or 0
        if outside >= RESOLUTION_MB:
            print(f"  {row['library']}: train takes {outside:,.0f} MB more around torch's allocator")
    sys.stdout.flush()


def print_summary(comparisons: list[dict]) -> None:
    """The ratio of the best peer to diffnl, system by system."""
    print("\nBest peer / diffnl: above 1, diffnl is that many times faster or smaller")
    columns = filled(COLUMNS, comparisons)
    lines = [
        [ratios["system"], *(show_ratio(ratios[column]) for column in columns)] for ratios in comparisons
    ]
    print_table(["system", *map(title_of, columns)], lines)


def show_ratio(cell: dict | None) -> str:
    """One entry of `compare`, like "3.4x vesin"."""
    if cell is None:
        return "-"
    return f"{'>' if cell['at_least'] else ''}{cell['ratio']:.1f}x {cell['peer']}"


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


def title_of_record(record: dict) -> str:
    """One line for the plot of a run, from its JSON."""
    where, settings = record["machine"], record["settings"]
    threads = "" if "driver" in where else f"{where['threads']} threads, "
    workload = f"{settings['cutoff_angstrom']} Å, {settings['density_per_cubic_angstrom']} atoms/Å³"
    return f"{where['device']}, torch {where['torch']}, {threads}{settings['dtype']}, {workload}"


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Log-log PNG over the atoms of the single boxes: a panel a column, a labelled line a library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    boxes = [row for row in rows if row["system"].startswith("bulk")]
    columns = filled(COLUMNS, boxes)
    across = math.ceil(len(columns) / 2)
    down = math.ceil(len(columns) / across)
    figure, panels = plt.subplots(down, across, figsize=(4.8 * across, 4.2 * down), squeeze=False)
    palette = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]
    colors = dict(zip(LIBRARIES, ["black", *palette], strict=False))
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
        step, unit = column.rsplit("_", 1)
        panel.set(title=step if unit == "ms" else f"{step.split('_')[0]}: peak memory", xlabel="atoms")
        growth = "" if step.endswith("_peak") else " growth"
        panel.set_ylabel("time (ms)" if unit == "ms" else f"peak memory{growth} (MB)")
        panel.grid(True, which="major", alpha=0.3)
        low, high = panel.get_xlim()
        panel.set_xlim(low, high * (high / low) ** 0.5)  # room for the labels inside the frame
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
