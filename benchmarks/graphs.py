"""Forward and backward in a graph: microseconds a replay, next to what peers do at best.

    python benchmarks/graphs.py                        # 1,000 atoms, 6 Å, float32, all libraries
    python benchmarks/graphs.py --size 10648 --dtype float64

The step is the full list with differentiable vectors, and the gradients to positions and cell of a weighted
sum of them. Each library runs in a process of its own, once as its users call it and once captured in a CUDA
or HIP graph if that can be done: a capture that fails may take its process with it. diffnl needs a `capacity`
for that; nothing else differs. Calls are timed one after the other (`stream`), and alone, with the host
waiting for each (`alone`). Both are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from harness import CUTOFF, System, describe, make_system
from peers import GATHERS, LIBRARIES, MAX_NEIGHBORS

PEERS = ("vesin-torch", "nvalchemi", "nvalchemi-cell", "nvalchemi-tile", "nvalchemi-matrix")


def _padded(system: System, skin: float = 0.0):
    import diffnl

    capacity = diffnl.estimate_capacity(
        system.positions, system.cell, system.pbc, CUTOFF, system.system_idx, skin=skin
    )
    layer = diffnl.NeighborList(CUTOFF, capacity=capacity, skin=skin)
    return lambda r, h, system, _: layer(r, h, system.pbc, system.system_idx)[:3]


def _matrix(system: System):
    """nvalchemi's list of fixed shape, the one that a graph could hold."""
    from nvalchemiops.torch.neighbors import neighbor_list

    options = {"method": "cell_list", "max_neighbors": MAX_NEIGHBORS, "return_vectors": True}

    def run(positions, cell, system, _):
        found = neighbor_list(positions, CUTOFF, cell=cell, pbc=system.pbc, **options)
        vectors = next(t for t in found if t.is_floating_point() and t.shape[-1] == 3)
        return found[0], found[2], vectors

    return run


def make_run(name: str, captured: bool, system: System):
    if name == "diffnl":
        return _padded(system) if captured else LIBRARIES[name].make(GATHERS["index_select"])
    if name == "diffnl-skin":
        return _padded(system, skin=1.0)
    if name == "nvalchemi-matrix":
        return _matrix(system)
    return LIBRARIES[name].make(GATHERS["index_select"])


def make_step(run, system: System):
    """The call to time: a new list, and gradients through it."""
    positions, cell = system.leaves()
    weights = torch.randn_like(run(positions, cell, system, True)[2])

    def step():
        vectors = run(positions, cell, system, True)[2]
        return torch.autograd.grad(vectors, (positions, cell), weights)

    return step


def capture(step):
    """The step in a graph: the call that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    return lambda: (graph.replay(), kept)


def microseconds(call, count: int = 200, rounds: int = 9) -> dict[str, float]:
    """Medians over the rounds, per call."""
    for _ in range(20):
        call()
    times: dict[str, list[float]] = {"stream": [], "alone": []}
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        times["stream"].append((time.perf_counter() - start) / count * 1e6)
        start = time.perf_counter()
        for _ in range(count):
            call()
            torch.cuda.synchronize()
        times["alone"].append((time.perf_counter() - start) / count * 1e6)
    return {kind: round(statistics.median(values), 1) for kind, values in times.items()}


def measure(name: str, captured: bool, size: str, dtype: torch.dtype) -> dict:
    system = make_system(size, dtype, "cuda", 0)
    if name in LIBRARIES:
        system = LIBRARIES[name].view(system)
    elif name == "diffnl-skin":
        system = LIBRARIES["diffnl"].view(system)
    elif name == "nvalchemi-matrix":
        system = LIBRARIES["nvalchemi"].view(system)
    step = make_step(make_run(name, captured, system), system)
    return microseconds(capture(step) if captured else step)


def measure_apart(name: str, captured: bool, options: argparse.Namespace) -> dict:
    """`measure` in a process of its own; {"error": why} where that fails."""
    mode = "captured" if captured else "eager"
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        mode,
        "--size",
        options.size,
        "--dtype",
        options.dtype,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"over {options.limit:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:160]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1000")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one library")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, mode = options.one
        try:
            result = measure(name, mode == "captured", options.size, getattr(torch, options.dtype))
        except Exception as error:  # a peer may fail in any way
            result = {"error": describe(error)}
        print(json.dumps(result))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {options.size} atoms, {options.dtype}")
    best = {"diffnl": float("inf"), "peers": float("inf")}
    for name in ("diffnl", "diffnl-skin", *PEERS):
        for captured in (False, True):
            found = measure_apart(name, captured, options)
            mode = "captured" if captured else "eager"
            print(f"{name:18} {mode:9}", found, flush=True)
            # With a skin nothing is searched here, where no atom moves: told, and not compared.
            if "alone" in found and name != "diffnl-skin":
                side = "diffnl" if name == "diffnl" else "peers"
                best[side] = min(best[side], found["alone"])
    ours, theirs = best["diffnl"], best["peers"]
    print(f"best alone: diffnl {ours} us, peers {theirs} us: {theirs / ours:.1f}x")


if __name__ == "__main__":
    main()
