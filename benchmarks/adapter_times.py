"""Milliseconds a call of each adapter and of what it replaces, in one run on the same structures.

    python benchmarks/adapter_times.py                  # those whose packages are installed
    python benchmarks/adapter_times.py --only "ase mace" --json times.json
    python benchmarks/adapter_times.py --join build/adapters/times-*.json

A file of `benchmarks/adapters/` is a row or more: `PACKAGES` are the distributions it needs, `calls(atoms)`
gives {row: (ours, theirs)}, two calls without arguments that do the same work, for a periodic box as
`ase.Atoms`. Calls take turns; medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "adapters"
# This folder comes first when the script runs, and a module of ours would hide a package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != FOLDER.parent]


def load(path: Path):
    """The module of a file whose name may be that of a package."""
    spec = importlib.util.spec_from_file_location(f"adapter_times_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def box(atoms: int):
    """A cubic box of silicon atoms on a jittered lattice, 0.05 atoms/Å³."""
    import numpy as np
    from ase import Atoms

    rng = np.random.default_rng(0)
    edge = round(atoms ** (1 / 3))
    sites = np.stack(np.meshgrid(*[np.arange(edge)] * 3), -1).reshape(-1, 3)
    spacing = 20.0 ** (1 / 3)
    positions = spacing * (sites + 0.1 * rng.standard_normal(sites.shape))
    return Atoms(f"Si{len(sites)}", positions, cell=edge * spacing * np.eye(3), pbc=True)


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def take_turns(ours, theirs, budget: float) -> dict[str, float]:
    """Medians of calls one after the other, at least five rounds, for about `budget` seconds."""
    for call in (ours, theirs):
        call(), call()
    times: dict[str, list[float]] = {"diffnl": [], "theirs": []}
    end = time.perf_counter() + budget
    while len(times["diffnl"]) < 5 or time.perf_counter() < end:
        times["diffnl"].append(milliseconds(ours))
        times["theirs"].append(milliseconds(theirs))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def measure(options: argparse.Namespace) -> list[dict]:
    rows = []
    for path in sorted(FOLDER.glob("*.py")):
        if options.only and path.stem not in options.only.split():
            continue
        module = load(path)
        try:
            packages = {name: version(name) for name in module.PACKAGES}
        except PackageNotFoundError:
            continue
        for name, (ours, theirs) in module.calls(box(options.atoms)).items():
            row = {"row": name, "packages": packages, "atoms": options.atoms}
            rows.append(row | take_turns(ours, theirs, options.budget))
            show(rows[-1])
    return rows


def show(row: dict) -> None:
    ratio = row["theirs"] / row["diffnl"]
    against = ", ".join(f"{name} {number}" for name, number in row["packages"].items())
    print(f"{row['row']:44}{row['diffnl']:>10.3f}{row['theirs']:>10.3f}{ratio:>8.1f}x  {against}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--only", default="", help="names of benchmarks/adapters, by spaces")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a row")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--join", type=Path, nargs="*", help="print what earlier runs wrote, and time nothing"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the packages
    print(f"{'ms a call':44}{'diffnl':>10}{'theirs':>10}{'ratio':>9}")
    if options.join is not None:
        for row in (row for path in options.join for row in json.loads(path.read_text())):
            show(row)
        return
    rows = measure(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
