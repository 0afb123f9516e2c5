"""What a skin and several cutoffs in one search save, in milliseconds a call.

    python benchmarks/skin.py                      # 10,648 atoms, 6 Å, skin 1 Å, all threads
    python benchmarks/skin.py --size 1000 --dtype float64
    python benchmarks/skin.py --device cuda

The atoms of the workload are moved by thermal displacements before every call, the same for all: 0.05 Å an
axis, of which a skin of 1 Å bears much. Calls that are compared take turns. Best and median of all rounds.

Then the same walk as it is and with its atoms wrapped into the cell at each step, as some codes do: searches,
and times of the calls that do not search. For the times layers take turns.

Last, a batch on its way, each step by 0.02 Å an axis at random, the atoms of one system further: what the
layer does, which on the CPU searches those systems that need it, and what it would be to search all then.
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


def wrap(system: System, positions: torch.Tensor) -> torch.Tensor:
    """positions (N, 3) moved by lattice vectors into their cells."""
    cell = system.cell.reshape(-1, 3, 3).double()
    h = cell[0] if system.system_idx is None else cell[system.system_idx]
    cells = torch.linalg.solve(h, positions.double()[:, None, :], left=False)[:, 0].floor()
    moved = positions.double() - (cells[:, None, :] @ h)[:, 0]
    return moved.to(positions.dtype)


def follow_wrapped(system: System, skin: float, steps: int) -> None:
    where = system.cell, system.pbc, system.system_idx
    options = {"": {}}
    if system.positions.device.type == "cuda":
        room = diffnl.estimate_capacity(system.positions, *where[:2], CUTOFF, where[2], skin=skin, slack=0.1)
        options[", with capacity"] = {"capacity": room}
    for name, option in options.items():
        layers = {kind: diffnl.NeighborList(CUTOFF, skin=skin, **option) for kind in ("as it is", "wrapped")}
        times: dict[str, list[float]] = {"as it is": [], "wrapped": [], "fresh, sorted": []}
        positions, velocity = system.positions, 0.0
        jumped, before = 0, wrap(system, positions)
        for move in random_moves(positions, 0.02, steps):
            velocity = 0.5 * velocity + move
            positions = positions + velocity
            wrapped = wrap(system, positions)
            jumped += int(((wrapped - before).norm(dim=1) > 3.0).any())
            before = wrapped
            for kind, layer in layers.items():
                r, searches = wrapped if kind == "wrapped" else positions, layer.searches
                time = seconds(lambda r=r, layer=layer: layer(r, *where), r.device.type)
                if layer.searches == searches:
                    times[kind].append(time * 1e3)
            fresh = diffnl.NeighborList(CUTOFF, sorted=True, **option)
            times["fresh, sorted"].append(
                seconds(lambda r=wrapped, f=fresh: f(r, *where), r.device.type) * 1e3
            )
        searches = {kind: layer.searches for kind, layer in layers.items()}
        print(
            f"wrapped{name}: atoms jump in {jumped} of {steps} steps; searches {searches['wrapped']}, "
            f"as it is {searches['as it is']}: {searches['wrapped'] / searches['as it is']:.2f}x"
        )
        for kind, values in times.items():
            print(f"  {kind:22} {min(values):8.3f} {statistics.median(values):8.3f} ms")


def follow_batch(size: str, hot: float, dtype: torch.dtype, device: str, skin: float, steps: int) -> None:
    system = make_system(size, dtype, device, 0)
    where = system.cell, system.pbc, system.system_idx
    temper = torch.where(system.system_idx == 0, hot, 1.0).to(system.positions)[:, None]
    as_it_is, anew = diffnl.NeighborList(CUTOFF, skin=skin), diffnl.NeighborList(CUTOFF, skin=skin)
    milliseconds, searches = {"as it is": 0.0, "all anew": 0.0}, {"as it is": 0, "all anew": 0}
    positions = system.positions
    for move in random_moves(positions, 0.02, steps):
        positions = positions + temper * move
        before = as_it_is.searches
        milliseconds["as it is"] += seconds(lambda r=positions: as_it_is(r, *where), device) * 1e3
        searches["as it is"] += as_it_is.searches > before
        before = anew.searches
        time = seconds(lambda r=positions, layer=anew: layer(r, *where), device)
        if anew.searches > before:
            # What it would have been to search all: the first call of a layer.
            anew = diffnl.NeighborList(CUTOFF, skin=skin)
            time = seconds(lambda r=positions, layer=anew: layer(r, *where), device)
            searches["all anew"] += 1
        milliseconds["all anew"] += time * 1e3
    print(f"{size} atoms, {steps} steps, the first system {hot:g} times as fast:", end="")
    for name, total in milliseconds.items():
        print(f"  {name} {total / steps:.3f} ms a step, {searches[name]} with a search", end=";")
    print(f"  {milliseconds['all anew'] / milliseconds['as it is']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="10648")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skin", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", default="32x64", help="systems x atoms of the batch")
    parser.add_argument("--steps", type=int, default=300, help="of the batch")
    parser.add_argument("--wrapped-steps", type=int, default=60, help="of the walk that is wrapped")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    system = make_system(options.size, dtype, options.device, 0)
    threads = f"{torch.get_num_threads()} threads" if options.device == "cpu" else options.device
    print(f"{options.size} atoms, {options.dtype}, {threads}, cutoff {CUTOFF} Å")
    moved = [system.positions + move for move in random_moves(system.positions, 0.05, options.rounds)]
    compare_reuse(system, moved, options.skin)
    compare_cutoffs(system, moved)
    follow_wrapped(system, options.skin, options.wrapped_steps)
    for hot in (1.0, 4.0):
        follow_batch(options.batch, hot, dtype, options.device, options.skin, options.steps)


if __name__ == "__main__":
    main()
