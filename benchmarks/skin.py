"""What a skin and several cutoffs in one search save on the CPU, in milliseconds a call.

    python benchmarks/skin.py                      # 10,648 atoms, 6 Å, skin 1 Å, all threads
    python benchmarks/skin.py --size 1000 --dtype float64

The atoms of the workload are moved by thermal displacements before every call, the same for all: 0.05 Å an
axis, of which a skin of 1 Å bears much. Calls that are compared take turns. Best and median of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness import CUTOFF, make_system

import diffnl


def take_turns(calls: dict, moved: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Milliseconds (best, median) of each call on each of the positions."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for positions in moved:
        for name, call in calls.items():
            start = time.perf_counter()
            kept = call(positions)
            times[name].append((time.perf_counter() - start) * 1e3)
            del kept
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="10648")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--skin", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    system = make_system(options.size, getattr(torch, options.dtype), "cpu", 0)
    cell, pbc = system.cell, system.pbc
    generator = torch.Generator().manual_seed(1)
    moved = [
        system.positions + 0.05 * torch.randn(system.positions.shape, generator=generator).to(cell)
        for _ in range(options.rounds)
    ]
    print(f"{options.size} atoms, {options.dtype}, {torch.get_num_threads()} threads, cutoff {CUTOFF} Å")

    layer = diffnl.NeighborList(CUTOFF, skin=options.skin)
    layer(system.positions, cell, pbc)
    calls = {
        f"reused, skin {options.skin} Å": lambda r: layer(r, cell, pbc),
        "fresh, sorted": lambda r: diffnl.neighbor_pairs(r, cell, pbc, CUTOFF, sorted=True),
        "fresh, unsorted": lambda r: diffnl.neighbor_pairs(r, cell, pbc, CUTOFF),
    }
    times = take_turns(calls, moved)
    reused = next(iter(times.values()))[1]
    for name, (best, median) in times.items():
        print(f"{name:24} {best:8.3f} {median:8.3f} ms  {median / reused:5.2f}x")
    print(f"searches {layer.searches}, reuses {layer.reuses}")

    for cutoffs in ((3.0, 6.0), (5.0, 6.0), (4.0, 5.0, 6.0)):
        calls = {
            "one search": lambda r, c=cutoffs: diffnl.neighbor_pairs(r, cell, pbc, c),
            "a search each": lambda r, c=cutoffs: [diffnl.neighbor_pairs(r, cell, pbc, one) for one in c],
        }
        times = take_turns(calls, moved)
        one, each = (times[name][1] for name in calls)
        print(f"{str(cutoffs):24} {one:8.3f} of {each:8.3f} ms  {one / each:5.2f}x")


if __name__ == "__main__":
    main()
