"""What the benchmarks share: the systems, the clock, peak memory, and a record of what they ran on."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CUTOFF = 6.0  # Å
DENSITY = 0.1  # atoms per Å³
JITTER = 0.6  # full width of the uniform displacement of an atom, in lattice spacings
MEGABYTE = 1024**2
RESOLUTION_MB = 1  # the kernel counts resident pages per core and in batches; smaller growth is noise


@dataclass(frozen=True)
class System:
    """One workload: a periodic box, or a batch of them.

    `positions` (N, 3) in Å; `cell` (3, 3), or (B, 3, 3) for a batch, rows are lattice vectors in Å; `pbc`
    (3,) or (B, 3) bool; `system_idx` (N,) int64 for a batch, None for one box.
    """

    label: str
    positions: torch.Tensor
    cell: torch.Tensor
    pbc: torch.Tensor
    system_idx: torch.Tensor | None

    @property
    def atoms(self) -> int:
        return self.positions.shape[0]

    @property
    def systems(self) -> int:
        return 1 if self.system_idx is None else self.cell.shape[0]

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh `positions` and `cell` that require gradients."""
        return self.positions.clone().requires_grad_(), self.cell.clone().requires_grad_()


def jittered_lattice(side: int, generator: torch.Generator, triclinic: bool = False):
    """`side`³ shuffled atoms near a cubic lattice: positions (N, 3) and cell (3, 3) in Å, float64.

    Atoms of the first layers fall slightly outside the cell, as they do in molecular dynamics.
    """
    spacing = DENSITY ** (-1 / 3)
    axis = torch.arange(side, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    noise = torch.rand(lattice.shape, dtype=torch.float64, generator=generator) - 0.5
    positions = (lattice + JITTER * noise) * spacing
    cell = torch.eye(3, dtype=torch.float64) * side * spacing
    if triclinic:
        shear = torch.tensor([[1, 0, 0], [0.2, 1, 0], [0.1, 0.3, 1]], dtype=torch.float64)
        positions, cell = positions @ shear, cell @ shear
    return positions[torch.randperm(len(positions), generator=generator)], cell


def cube_side(atoms: int) -> int:
    """The integer whose cube is `atoms`; ValueError if there is none."""
    side = round(atoms ** (1 / 3))
    if atoms < 1 or side**3 != atoms:
        nearest = max(side, 1) ** 3
        raise ValueError(f"a size must be a cube like 1000 or 10648, got {atoms}; the nearest is {nearest}")
    return side


def make_system(size: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> System:
    """The system that `size` names: "1000" is one cubic box, "512x27" are 512 triclinic boxes of 27 atoms.

    The same size and seed give the same atoms in every process.
    """
    generator = torch.Generator().manual_seed(seed)
    count, _, atoms = size.rpartition("x")
    side = cube_side(int(atoms))
    if not count:
        positions, cell = jittered_lattice(side, generator)
        pbc, system_idx = torch.ones(3, dtype=torch.bool), None
    else:
        batch = int(count)
        boxes = [jittered_lattice(side, generator, triclinic=True) for _ in range(batch)]
        positions = torch.cat([box[0] for box in boxes])
        cell = torch.stack([box[1] for box in boxes])
        pbc = torch.ones(batch, 3, dtype=torch.bool)
        system_idx = torch.arange(batch).repeat_interleave(side**3).to(device)
    label = f"batch-{size}" if count else f"bulk-{size}"
    return System(label, positions.to(device, dtype), cell.to(device, dtype), pbc.to(device), system_idx)


def seconds(call: Callable[[], object], device: str) -> float:
    """Time of one call: events on a GPU, the wall clock on the CPU."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def time_in_turns(
    prepare: dict[str, Callable[[], Callable[[], object]]], device: str, budget: float, rounds: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times every entry in `rounds` turns, so that a slow minute of the machine falls on all of them alike.

    `prepare[name]()` builds whatever the timed call needs. It runs anew in each turn and its state is dropped
    after it, so that only one entry holds memory at a time. The order rotates between rounds. Each entry gets
    about `budget` seconds in all and at least one call a turn, after a warm-up.

    Returns the times in seconds by name, and the message of the error by name for entries that raised one.
    """
    times: dict[str, list[float]] = {name: [] for name in prepare}
    errors: dict[str, str] = {}
    names = list(prepare)
    gc.collect()
    for turn in range(rounds):
        shift = turn * len(names) // rounds
        for name in names[shift:] + names[:shift]:
            if name in errors:
                continue
            gc.disable()
            try:
                call = prepare[name]()
                first = seconds(call, device)
                # After the first turn a long call needs no warm-up; a short one needs its caches warm again.
                if turn and first > budget / (2 * rounds):
                    times[name].append(first)
                    continue
                seconds(call, device)
                stop = time.perf_counter() + budget / rounds
                for _ in range(200):
                    times[name].append(seconds(call, device))
                    if time.perf_counter() > stop:
                        break
            except Exception as error:  # a peer may fail in any way; the others go on
                errors[name] = describe(error)
            finally:
                call = None
                gc.enable()
    return {name: samples for name, samples in times.items() if name not in errors}, errors


def describe(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def peak_growth_mb(call: Callable[[], object], device: str) -> float | None:
    """By how many MB one call raised the peak memory, its results included.

    On the CPU: resident memory of this process, so meant for a fresh process; None where the kernel cannot
    reset the high-water mark. On a GPU: torch's allocator, which does not see what a library allocates
    around it.
    """
    gc.collect()
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    try:
        # Pages that the allocator kept from earlier work would hide the same amount of new growth.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM (proc(5))
        before = _status_kb("VmRSS")
        call()
        return (_status_kb("VmHWM") - before) / 1024
    except (OSError, AttributeError, KeyError):
        return None


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def available_memory_mb() -> float:
    """Memory that new work can use, in MB; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) / 1024
    except (OSError, KeyError):
        return float("inf")


def machine(device: str, threads: int) -> dict:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "logical_cores": os.cpu_count(),
        "device": cpu if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or "unknown"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
