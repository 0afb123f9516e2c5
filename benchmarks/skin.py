"""What a skin and several cutoffs in one search save, in milliseconds a call.

    python benchmarks/skin.py                      # 10,648 atoms, 6 Å, skin 1 Å, all threads
    python benchmarks/skin.py --size 1000 --dtype float64
    python benchmarks/skin.py --device cuda

The atoms of the workload are moved by thermal displacements before every call, the same for all: 0.05 Å an
axis, of which a skin of 1 Å bears much. Calls that are compared take turns. Best and median of all rounds.

Last, a batch on its way: whether it would pay to search system by system where only some need it. Each step
moves all atoms by 0.02 Å an axis at random; a layer follows the batch, and one each system, which tells how
often that system alone would have been searched.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from harness import CUTOFF, System, make_system, seconds

import diffnl


def take_turns(calls: dict, moved: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Milliseconds (best, median) of each call on each of the positions."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    kept: list = [None]
    for positions in moved:
        for name, call in calls.items():

            def timed(call=call, positions=positions):
                kept[0] = call(positions)

            times[name].append(seconds(timed, positions.device.type) * 1e3)
            kept[0] = None
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def random_moves(positions: torch.Tensor, size: float, count: int) -> list[torch.Tensor]:
    """(N, 3) each, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    return [size * torch.randn(positions.shape, generator=generator).to(positions) for _ in range(count)]


def compare_reuse(system: System, moved: list[torch.Tensor], skin: float) -> None:
    where = system.cell, system.pbc, system.system_idx
    layer = diffnl.NeighborList(CUTOFF, skin=skin)
    calls = {
        f"reused, skin {skin} Å": lambda r: layer(r, *where),
        "fresh, sorted": lambda r: diffnl.NeighborList(CUTOFF, sorted=True)(r, *where),
        "fresh, unsorted": lambda r: diffnl.NeighborList(CUTOFF)(r, *where),
    }
    if system.positions.device.type == "cuda":
        room = diffnl.estimate_capacity(system.positions, *where[:2], CUTOFF, where[2], skin=skin)
        padded = diffnl.NeighborList(CUTOFF, skin=skin, capacity=room)
        padded(system.positions, *where)
        calls["reused, with capacity"] = lambda r: padded(r, *where)
        calls["fresh, with capacity"] = lambda r: diffnl.NeighborList(CUTOFF, capacity=room)(r, *where)
    layer(system.positions, *where)
    times = take_turns(calls, moved)
    reused = next(iter(times.values()))[1]
    for name, (best, median) in times.items():
        print(f"{name:24} {best:8.3f} {median:8.3f} ms  {median / reused:5.2f}x")
    print(f"searches {layer.searches}, reuses {layer.reuses}")


def compare_cutoffs(system: System, moved: list[torch.Tensor]) -> None:
    where = system.cell, system.pbc, system.system_idx
    for cutoffs in ((3.0, 6.0), (5.0, 6.0), (4.0, 5.0, 6.0)):
        calls = {
            "one search": lambda r, c=cutoffs: diffnl.NeighborList(c)(r, *where),
            "a search each": lambda r, c=cutoffs: [diffnl.NeighborList(one)(r, *where) for one in c],
        }
        times = take_turns(calls, moved)
        one, each = (times[name][1] for name in calls)
        print(f"{cutoffs!s:24} {one:8.3f} of {each:8.3f} ms  {one / each:5.2f}x")


def follow_batch(size: str, dtype: torch.dtype, device: str, skin: float, steps: int) -> None:
    system = make_system(size, dtype, device, 0)
    of_system = [torch.nonzero(system.system_idx == b)[:, 0] for b in range(len(system.cell))]
    whole = diffnl.NeighborList(CUTOFF, skin=skin)
    single = [diffnl.NeighborList(CUTOFF, skin=skin) for _ in of_system]
    positions, times, somewhere = system.positions, {True: [], False: []}, 0
    for move in random_moves(positions, 0.02, steps):
        positions = positions + move
        searches = whole.searches
        time = seconds(lambda r=positions: whole(r, system.cell, system.pbc, system.system_idx), device)
        times[whole.searches > searches].append(time * 1e3)
        before = sum(layer.searches for layer in single)
        for b, atoms in enumerate(of_system):
            single[b](positions[atoms], system.cell[b], system.pbc[b])
        somewhere += sum(layer.searches for layer in single) > before
    search, reuse = (statistics.median(times[kind]) for kind in (True, False))
    together = whole.searches / steps
    alone = statistics.mean(layer.searches for layer in single) / steps
    costs = [reuse + share * (search - reuse) for share in (together, alone)]
    print(f"{size} atoms, {steps} steps: a search takes {search:.3f} ms, a reuse {reuse:.3f} ms")
    print(f"searches every {1 / together:.1f} steps for all, every {1 / alone:.1f} for a system by itself")
    print(f"a step {costs[0]:.3f} ms; by system, if that cost nothing more, {costs[1]:.3f} ms", end="  ")
    print(f"{costs[0] / costs[1]:5.2f}x")
    candidates = diffnl.neighbor_pairs(positions, system.cell, system.pbc, CUTOFF + skin, system.system_idx)
    rows = torch.zeros(len(candidates.shifts), dtype=torch.int64, device=device)
    copy = statistics.median(seconds(rows.clone, device) for _ in range(20)) * 1e3
    print(
        f"in {somewhere} steps some system would have been searched, and its rows moved among the others': "
        f"to copy all takes {copy:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="10648")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skin", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", default="32x64", help="systems x atoms of the batch")
    parser.add_argument("--steps", type=int, default=300, help="of the batch")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    system = make_system(options.size, dtype, options.device, 0)
    threads = f"{torch.get_num_threads()} threads" if options.device == "cpu" else options.device
    print(f"{options.size} atoms, {options.dtype}, {threads}, cutoff {CUTOFF} Å")
    moved = [system.positions + move for move in random_moves(system.positions, 0.05, options.rounds)]
    compare_reuse(system, moved, options.skin)
    compare_cutoffs(system, moved)
    follow_batch(options.batch, dtype, options.device, options.skin, options.steps)


if __name__ == "__main__":
    main()
