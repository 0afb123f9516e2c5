"""A page of Markdown, and its plots, from what `cuda_run.py` left in its folder: nothing typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bandwidth import FLOOR_STEPS
from harness import MEGABYTE
from peers import STEPS
from tables import chosen_ways, filled, plot, show, show_ratio, title_of, title_of_record

STAGES = ("build", "test", "sanitize", "bench", "train")
DTYPES = ("float32", "float64")
MACHINE = (
    ("device", "GPU"),
    ("device_memory_gb", "GPU memory (GB)"),
    ("driver", "driver"),
    ("cuda", "CUDA of torch"),
    ("nvcc", "nvcc"),
    ("torch", "torch"),
    ("python", "Python"),
    ("cpu", "CPU"),
    ("logical_cores", "logical cores"),
    ("commit", "commit"),
)
TIMES = [f"{step}_ms" for step in STEPS]
MEMORY = ["train_peak_mb", "train_mb", "vectors_mb"]


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers go to the right."""
    numbers = [all(re.match(r"[-<\d]", str(row[k])) for row in rows) for k in range(len(titles))]
    rule = ["---:" if right else "---" for right in numbers]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [titles, rule, *rows])


def read_summary(results: Path) -> dict:
    """{"machine", "date", "stages": {name: facts}} of what is in the folder."""
    path = results / "machine.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    paths = ((name, results / f"stage-{name}.json") for name in STAGES)
    return summary | {"stages": {name: json.loads(path.read_text()) for name, path in paths if path.exists()}}


def write_report(results: Path, target: Path) -> Path:
    """Writes the page for the folder `results` to `target`, a .md file or a folder; returns its path."""
    summary = read_summary(results)
    records = {}
    for dtype in DTYPES:
        path = results / f"neighbors-{dtype}.json"
        if path.exists():
            records[dtype] = json.loads(path.read_text())
    machine = dict(summary.get("machine", {}))
    for record in records.values():
        machine = {**record["machine"], **machine}
    if target.suffix != ".md":
        name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("device", "unknown")).lower()).strip("-")
        target = target / f"{name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)

    parts = [
        f"# diffnl on {machine.get('device', 'an unknown device')}",
        f"Written by `benchmarks/cuda_run.py` from its results of {summary.get('date', 'an unknown day')}.",
        table(
            ["machine", ""],
            [[label, str(machine[key])] for key, label in MACHINE if machine.get(key) is not None],
        ),
        *stages(summary["stages"]),
    ]
    for dtype, record in records.items():
        image = target.with_name(f"{target.stem}-{dtype}.png")
        if record["rows"]:
            plot(record["rows"], title_of_record(record), image)
        parts += benchmark(dtype, record, image.name)
    parts += training(summary["stages"].get("train"))
    target.write_text("\n\n".join(parts) + "\n")
    return target


def stages(found: dict) -> list[str]:
    """How each stage ended: build, tests, sanitizers, the benchmark of each dtype."""
    rows = []
    if "build" in found:
        archs = found["build"].get("build_info", {}).get("archs", [])
        rows.append(
            ["build", found["build"]["status"], f"{found['build']['seconds']:.0f} s", ", ".join(archs)]
        )
    if "test" in found:
        outcome = ", ".join(f"{count} {what}" for what, count in found["test"].get("outcome", {}).items())
        rows.append(["tests", found["test"]["status"], f"{found['test']['seconds']:.0f} s", outcome])
    for tool, result in found.get("sanitize", {}).get("tools", {}).items():
        detail = f"{result['errors']} errors, {result['in_diffnl']} in diffnl's kernels"
        if result.get("elsewhere"):
            detail += f"; elsewhere: `{result['elsewhere'][0]}`"
        rows.append([f"compute-sanitizer {tool}", result["verdict"], f"{result['seconds']:.0f} s", detail])
    for dtype, run in found.get("bench", {}).get("runs", {}).items():
        detail = "" if run["status"] == "ok" else "the last systems are missing"
        rows.append([f"benchmark in {dtype}", run["status"], f"{run['seconds']:.0f} s", detail])
    return ["## Build, tests, sanitizers, times", table(["", "result", "time", ""], rows)] if rows else []


def benchmark(dtype: str, record: dict, image: str) -> list[str]:
    """One run of `neighbors.py`: ratios, floors, all times, all memory."""
    settings, rows = record["settings"], record["rows"]
    own = {row["system"]: row for row in rows if row["library"] == "diffnl"}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"## {dtype}",
        f"Periodic boxes and batches of boxes, {settings['density_per_cubic_angstrom']} atoms/Å³, cutoff "
        f"{settings['cutoff_angstrom']} Å, full lists, all libraries in one run; medians by events. The "
        f"steps are those of `benchmarks/neighbors.py`. {versions}.",
    ]
    if record["missing"]:
        parts.append("Not installed: " + ", ".join(record["missing"]) + ".")
    columns = filled([*TIMES, "train_peak_mb"], rows)
    lines = []
    for ratios in record["best_peer_over_diffnl"]:
        row = own[ratios["system"]]
        cells = [f"{show(row[c], c)} ({show_ratio(ratios[c])})" for c in columns]
        lines.append([ratios["system"], f"{row['pairs']:,}", *cells])
    if lines:
        parts += [
            "diffnl, and in brackets the best peer over diffnl: above 1, diffnl is that many times faster or "
            "smaller.",
            table(["system", "pairs", *map(title_of, columns)], lines),
            f"![times and memory over atoms]({image})",
        ]
    parts += floors(record)
    if rows:
        parts += ["All libraries:", every_row(rows, TIMES)]
        memory = filled(MEMORY, rows)
        if memory:
            parts += [
                "Peak memory of torch's allocator. `train peak` includes the inputs, the others are what the "
                "step adds. A library's own allocations around torch's are in the last column.",
                every_row(rows, [*memory, *filled(["train_outside_mb"], rows)]),
            ]
    ways = [f"- {row['system']}, {row['library']}: {line}" for row in rows if (line := chosen_ways(row))]
    if ways:
        parts += ["Vectors by plain torch, the faster way in each step, and what the other would take:"]
        parts += ["\n".join(ways)]
    notes = [f"- {row['system']}, {row['library']}: {row['note']}" for row in rows if row["note"]]
    if notes:
        parts += ["Refused, failed or not run:", "\n".join(notes)]
    return parts


def every_row(rows: list[dict], columns: list[str]) -> str:
    lines = [
        [row["system"], row["library"], *(show(row.get(column), column) for column in columns)]
        for row in rows
        if any(row.get(column) is not None for column in columns)
    ]
    return table(["system", "library", *map(title_of, columns)], lines)


def floors(record: dict) -> list[str]:
    """Floors, the box of 10⁷ atoms, and whether results repeat."""
    parts = []
    if record["floors"]:
        lines = []
        for floor in record["floors"]:
            cells = [f"{floor['pairs']:,}"]
            for step in FLOOR_STEPS:
                ratio = floor[f"{step}_ratio"]
                cells += [f"{floor[f'{step}_floor_ms']:.3g}", "-" if ratio is None else f"{ratio:.1f}x"]
            lines.append([floor["system"], *cells])
        titles = ["system", "pairs"]
        for step in FLOOR_STEPS:
            titles += [f"{step} floor ms", "diffnl"]
        parts += [
            f"Floors: {record['floors'][0]['bytes_a_pair']} bytes a pair, written by vectors and read by "
            f"backward, at the {record['bandwidth'] / 1e12:.2f} TB/s (bytes read and written) of a copy in "
            "the same run; for train, the same energy, gradient and double backward on vectors that exist.",
            table(titles, lines),
            *free(record),
        ]
    if record["large"]:
        lines = [
            [
                f"{row['atoms']:,}",
                f"{row['pairs']:,}",
                f"{row['vectors_ms']:.4g}",
                f"{row['ns_per_pair']:.4f}",
                f"{row['ratio']:.2f}x",
                f"{row['peak_mb'] * MEGABYTE / 1e9:.1f}",
                "right" if row["right"] else "WRONG",
            ]
            for row in record["large"]
        ]
        titles = ["atoms", "pairs", "vectors ms", "ns a pair", "", "peak GB", "sample"]
        parts += ["diffnl alone, list and vectors:", table(titles, lines)]
    if record["repeats"]:
        bits = {True: "the same bits", False: "OTHER BITS"}
        search, backward = (bits[record["repeats"][key]] for key in ("search", "backward"))
        parts.append(f"Twice on {record['repeats']['system']}: search {search}, backward {backward}.")
    if record["lost_to"]:
        parts.append(f"Left out after they broke the GPU's context: {', '.join(record['lost_to'])}.")
    return parts


def free(record: dict) -> list[str]:
    """The steps with a list that costs nothing, and diffnl's and the best peer's times over those."""
    lines = []
    for floor in record["floors"]:
        if "vectors_free_ms" not in floor:  # a record from before there was a free list
            continue
        cells = [floor["system"]]
        for step in FLOOR_STEPS:
            column, least = f"{step}_ms", floor[f"{step}_free_ms"]
            rows = [row for row in record["rows"] if row["system"] == floor["system"] and row[column]]
            cells.append(f"{least:.3g}")
            for own in (True, False):
                times = [row[column] for row in rows if (row["library"] == "diffnl") == own]
                cells.append(f"{min(times) / least:.1f}x" if times else "-")
        lines.append(cells)
    if not lines:
        return []
    titles = ["system"]
    for step in FLOOR_STEPS:
        titles += [f"{step} free ms", "diffnl over free", "best peer over free"]
    return [
        "The same steps with a free list: it searches and computes nothing, only hands out constants through "
        "a Python `autograd.Function`, after one tiny kernel and one wait for the GPU (`free_list` in "
        "`benchmarks/bandwidth.py`). `best peer over free` is how far ahead of the best peer such a list is: "
        "no differentiable list behind a Python `autograd.Function` can beat this ratio.",
        table(titles, lines),
    ]


def training(found: dict | None) -> list[str]:
    """The example, and the neighbour list's share of its steps."""
    if not found or not found.get("runs"):
        return []
    parts = [
        "## Training",
        "\n".join(
            f"- `examples/train_mlip.py --device cuda {run['command']}`: {run['status']} "
            f"({run['seconds']:.0f} s)"
            for run in found["runs"].values()
        ),
    ]
    if found.get("table"):
        parts.append("```\n" + "\n".join(found["table"]) + "\n```")
    lines = []
    for run in found["runs"].values():
        share = run["share"]
        if share:
            device = share.get("device_share")
            lines.append(
                [
                    str(share["batch_size"]),
                    f"{share['atoms']:.0f}",
                    f"{share['step_ms']:.1f}",
                    f"{share.get('busy_ms', 0):.1f}",
                    "-" if device is None else f"{device:.1%}",
                    f"{share['host_share']:.1%}",
                ]
            )
    if lines:
        titles = [
            "structures a step",
            "atoms",
            "step ms",
            "GPU busy ms",
            "diffnl of the busy time",
            "diffnl on the host",
        ]
        parts += [
            "The neighbour list's share of a training step, by torch's profiler: of the time the GPU is "
            "busy, and of the time the host takes, where waiting for the number of pairs counts.",
            table(titles, lines),
        ]
    return parts
