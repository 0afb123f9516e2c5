"""What the benchmarks share: the systems, the clock, peak memory, and a record of what they ran on."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

CUTOFF = 6.0  # Å
DENSITY = 0.1  # atoms per Å³
CHANGING = (0.03, 0.1, 0.05, 0.08)  # atoms per Å³ from call to call: no call is like the one before it
JITTER = 0.6  # full width of the uniform displacement of an atom, in lattice spacings
MEGABYTE = 1024**2
RESOLUTION_MB = 1  # the kernel counts resident pages per core and in batches; smaller growth is noise


@dataclass(frozen=True)
class System:
    """One workload: a periodic box, a batch of boxes of the same size, or several boxes in turn.

    `positions` (N, 3) in Å; `cell` (3, 3), or (B, 3, 3) for a batch, rows are lattice vectors in Å; `pbc`
    (3,) or (B, 3) bool; `system_idx` (N,) int64 for a batch, None for one box.

    `sweep` are the boxes of a workload that changes from call to call, of which this is the first.

    Libraries that want the batch described otherwise find that here, made once and not in the timed call.
    """

    label: str
    positions: torch.Tensor
    cell: torch.Tensor
    pbc: torch.Tensor
    system_idx: torch.Tensor | None
    sweep: tuple[System, ...] = ()

    @property
    def parts(self) -> tuple[System, ...]:
        """The systems that a step goes through, one after the other."""
        return self.sweep or (self,)

    @property
    def atoms(self) -> int:
        return self.positions.shape[0]

    @property
    def systems(self) -> int:
        return 1 if self.system_idx is None else self.cell.shape[0]

    @cached_property
    def batch_idx(self) -> torch.Tensor:
        """(N,) int32, the system of each atom."""
        return self.system_idx.int()

    @cached_property
    def batch_ptr(self) -> torch.Tensor:
        """(B + 1,) int32, the first atom of each system, and N."""
        each = self.atoms // self.systems
        return torch.arange(self.systems + 1, dtype=torch.int32, device=self.positions.device) * each

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh `positions` and `cell` that require gradients."""
        return self.positions.clone().requires_grad_(), self.cell.clone().requires_grad_()


def is_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type != "cpu"


def jittered_lattice(side: int, generator: torch.Generator, triclinic: bool = False):
    """`side`³ shuffled atoms near a cubic lattice: positions (N, 3) and cell (3, 3) in Å, float64.

    Atoms of the first layers fall slightly outside the cell, as they do in molecular dynamics. They are made
    where the generator lives: on a GPU 10⁷ atoms take no time.
    """
    like = {"dtype": torch.float64, "device": generator.device}
    spacing = DENSITY ** (-1 / 3)
    axis = torch.arange(side, **like)
    lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    noise = torch.rand(lattice.shape, generator=generator, **like) - 0.5
    positions = (lattice + JITTER * noise) * spacing
    cell = torch.eye(3, **like) * side * spacing
    if triclinic:
        shear = torch.tensor([[1, 0, 0], [0.2, 1, 0], [0.1, 0.3, 1]], **like)
        positions, cell = positions @ shear, cell @ shear
    return positions[torch.randperm(len(positions), generator=generator, device=generator.device)], cell


def cube_side(atoms: int) -> int:
    """The integer whose cube is `atoms`; ValueError if there is none."""
    side = round(atoms ** (1 / 3))
    if atoms < 1 or side**3 != atoms:
        nearest = max(side, 1) ** 3
        raise ValueError(f"a size must be a cube like 1000 or 10648, got {atoms}; the nearest is {nearest}")
    return side


def label_of(size: str) -> str:
    """How the rows call the system that `size` names."""
    kind = "changing" if size.startswith("~") else "batch" if "x" in size else "bulk"
    return f"{kind}-{size.removeprefix('~')}"


def make_system(size: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> System:
    """The system that `size` names: "1000" is one cubic box, "512x27" are 512 triclinic boxes of 27 atoms.

    "~1000" is the box of "1000" at the densities `CHANGING` in turn.

    The same size and seed give the same atoms in every process on the same kind of device.
    """
    if size.startswith("~"):
        box, label = make_system(size[1:], dtype, device, seed), label_of(size)
        stretches = [(DENSITY / density) ** (1 / 3) for density in CHANGING]
        parts = [System(label, box.positions * x, box.cell * x, box.pbc, None) for x in stretches]
        return replace(parts[0], sweep=tuple(parts))
    generator = torch.Generator(device).manual_seed(seed)
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
    return System(
        label_of(size), positions.to(device, dtype), cell.to(device, dtype), pbc.to(device), system_idx
    )


def seconds(call: Callable[[], object], device: str) -> float:
    """Time of one call: events on a GPU, the wall clock on the CPU."""
    if not is_gpu(device):
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
    about `budget` seconds in all and at least one call a turn (two on a GPU), after a warm-up.

    Returns the times in seconds by name, and the message of the error by name for entries that raised one.
    Raises DeviceLost if an entry took the GPU with it.
    """
    gpu = is_gpu(device)
    fewest, most = (2, 50) if gpu else (1, 200)
    times: dict[str, list[float]] = {name: [] for name in prepare}
    errors: dict[str, str] = {}
    names = list(prepare)
    gc.collect()
    for turn in range(rounds):
        shift = turn * len(names) // rounds
        for name in names[shift:] + names[:shift]:
            if name in errors:
                continue
            if not gpu:  # there a graph that hangs in a cycle would be memory that is missing
                gc.disable()
            try:
                call = prepare[name]()
                first = seconds(call, device)
                # After the first turn a long call needs no warm-up; a short one needs its caches warm again.
                # On a GPU a long call needs it too: torch's allocator has handed its blocks to the others.
                if turn and first > budget / (2 * rounds) and not gpu:
                    times[name].append(first)
                    continue
                seconds(call, device)
                stop = time.perf_counter() + budget / rounds
                for k in range(1, most + 1):
                    times[name].append(seconds(call, device))
                    if k >= fewest and time.perf_counter() > stop:
                        break
            except Exception as error:  # a peer may fail in any way; the others go on
                call = None
                errors[name] = survive(name, error, device)
            finally:
                call = None
                gc.enable()
    return {name: samples for name, samples in times.items() if name not in errors}, errors


def describe(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class DeviceLost(RuntimeError):
    """After a bad memory access no call of this process reaches the GPU any more."""

    def __init__(self, name: str, message: str):
        super().__init__(f"{name} broke the GPU's context: {message}")
        self.name = name


def survive(name: str, error: Exception, device: str) -> str:
    """The error of the library `name` on one line. Raises DeviceLost if nothing can run after it."""
    message = describe(error)
    if is_gpu(device):
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # an out-of-memory error must not be the next one's too
        except Exception as gone:
            raise DeviceLost(name, message) from gone
    return message


def peak_growth_mb(call: Callable[[], object], device: str) -> float | None:
    """By how many MB one call raised the peak memory, its results included.

    On the CPU: resident memory of this process, so meant for a fresh process; None where the kernel cannot
    reset the high-water mark. On a GPU: torch's allocator, which does not see what a library allocates
    around it.
    """
    gc.collect()
    if is_gpu(device):
        return gpu_peak_mb(call, device)["growth"]
    try:
        # Pages that the allocator kept from earlier work would hide the same amount of new growth.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM (proc(5))
        before = _status_kb("VmRSS")
        call()
        return (_status_kb("VmHWM") - before) / 1024
    except (OSError, AttributeError, KeyError):
        return None


def gpu_peak_mb(call: Callable[[], object], device: str) -> dict[str, float]:
    """Peak memory of one call on a GPU, in MB.

    `peak`: all that torch's allocator had given out at the worst moment (`max_memory_allocated`), the inputs
    included; `growth`: the same without what was there before; `outside`: by how much the call raised what
    the device holds for others than torch's allocator, which sees nothing of it.
    """

    def outside() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)

    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, outside_before = torch.cuda.memory_allocated(device), outside()
    kept = call()
    torch.cuda.synchronize(device)
    peak, outside_after = torch.cuda.max_memory_allocated(device), outside()
    del kept
    found = {"peak": peak, "growth": peak - before, "outside": max(outside_after - outside_before, 0)}
    return {key: value / MEGABYTE for key, value in found.items()}


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
    found = {
        "cpu": cpu,
        "logical_cores": os.cpu_count(),
        "device": cpu,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if is_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "device_memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def driver_version() -> str | None:
    """NVIDIA's driver, None where nvidia-smi does not say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or "unknown"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # diffnl runs from a checkout too
        return getattr(sys.modules.get(distribution), "__version__", "unknown")
