"""``python -m diffnl``: versions, libraries, devices, and whether lists and gradients are right on each.

What a report of a bug should contain. The exit status is 1 if something is wrong, or if torch was built
for GPUs and diffnl's library for them is missing or does not load.
"""

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import _load, reference
from ._version import __version__
from .neighbors import NeighborList

CUTOFF = 4.0
SIZES = {"cpu": (100, 1_000, 10_000), "cuda": (1_000, 10_000, 100_000)}  # atoms of the boxes that are timed
REPEATS = 5
SECONDS_A_DEVICE = 2.0  # no further sizes after that


def facts() -> Iterator[str]:
    """What this machine and its libraries are."""
    toolkit = "CPU"
    if torch.version.hip is not None:
        toolkit = f"HIP {torch.version.hip}"
    elif torch.version.cuda is not None:
        toolkit = f"CUDA {torch.version.cuda}{_driver()}"
    yield f"diffnl {__version__} in {_load.FOLDER}"
    yield f"torch {torch.__version__} for {toolkit}, {torch.get_num_threads()} threads"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield "libraries:"
    for part in _load.parts():
        words = [part.toolkit, f"torch {part.torch}" if part.torch else None, " ".join(part.archs)]
        built = ", ".join(word for word in words if word)
        state = "loaded" if part.loaded else f"not loaded: {part.reason}"
        name = Path(part.path).name if part.path else "missing"
        yield f"  {part.backend:4}  {name}  {f'({built}) ' if built else ''}{state}"
    yield "devices:"
    yield f"  cpu: {_processor()}"
    for device in devices()[1:]:
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = torch.cuda.get_device_name(device)
        yield f"  {device}: {name}, {_load.architecture(device)}, {gib:.0f} GiB"


def _driver() -> str:
    """The CUDA release that the driver is made for, which torch does not tell."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return ""
    except (OSError, AttributeError):
        return ", no driver"
    return f", driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


# ----------------------------------------------------------------------------------------- self-test


def batch(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A skewed crystal thinner than the cutoff, atoms outside it; a slab; a molecule: 60 atoms in turns."""
    generator = torch.Generator().manual_seed(0)
    cell = torch.tensor(
        [
            [[3.1, 0.4, 0.0], [-1.2, 6.0, 0.3], [0.7, 1.1, 7.5]],
            [[6.0, 0.0, 0.0], [2.0, 5.5, 0.0], [0.0, 0.0, 9.0]],
            [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]],
        ],
        dtype=torch.float64,
        device="cpu",
    )
    pbc = torch.tensor([[True, True, True], [True, True, False], [False, False, False]], device="cpu")
    system_idx = torch.arange(60, device="cpu") % 3
    fractional = torch.empty(60, 3, dtype=torch.float64, device="cpu").uniform_(
        -0.5, 1.5, generator=generator
    )
    positions = (fractional.unsqueeze(1) @ cell[system_idx]).squeeze(1)
    return positions.to(device, dtype), cell.to(device, dtype), pbc.to(device), system_idx.to(device)


def derivatives(
    search: Callable, positions: Tensor, cell: Tensor, pbc: Tensor, system_idx: Tensor
) -> list[Tensor]:
    """An energy, its first derivatives, and the derivatives of a loss on those."""
    positions, cell = positions.clone().requires_grad_(), cell.clone().requires_grad_()
    vectors = search(positions, cell, pbc, system_idx)
    energy = torch.exp(-vectors.square().sum(1) / 4).sum()
    first = torch.autograd.grad(energy, (positions, cell), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (positions, cell))
    return [t.detach().cpu() for t in (energy, *first, *second)]


def check_list(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a list on `device`, against the reference on the CPU."""
    found = NeighborList(CUTOFF, sorted=True)(*batch(device, dtype))
    positions, cell, pbc, system_idx = batch(torch.device("cpu"), dtype)
    expected = reference.neighbor_pairs(positions, cell, pbc, CUTOFF, system_idx, sorted=True)
    for name in ("mapping", "shifts", "vectors"):
        ours, oracle = getattr(found, name).cpu(), getattr(expected, name)
        if ours.shape != oracle.shape:
            return f"{name} has shape {tuple(ours.shape)}; the reference's is {tuple(oracle.shape)}"
        if not torch.equal(ours, oracle):
            rows = (ours != oracle).nonzero()[:, -1 if name == "mapping" else 0].unique()
            return f"{name} differs from the reference in {len(rows)} of {found.mapping.shape[1]} pairs"
    return None


def check_gradients(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with first and second derivatives, against autograd's of the reference in float64."""
    layer = NeighborList(CUTOFF)

    def through_reference(positions, cell, pbc, system_idx):
        return reference.neighbor_pairs(positions, cell, pbc, CUTOFF, system_idx).vectors

    found = derivatives(lambda *args: layer(*args).vectors, *batch(device, dtype))
    positions, cell, *rest = batch(torch.device("cpu"), dtype)
    expected = derivatives(through_reference, positions.double(), cell.double(), *rest)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    names = (
        "energy",
        "d/dpositions",
        "d/dcell",
        "second derivative by positions",
        "second derivative by cell",
    )
    for name, ours, oracle in zip(names, found, expected, strict=True):
        error = float((ours.double() - oracle).abs().max() / oracle.abs().max())
        if not error <= tolerance:
            return f"{name} differs from the reference's by {error:.1e} of the largest"
    return None


def milliseconds(device: torch.device, num_atoms: int) -> tuple[float, float]:
    """Median times of a list, and of list, energy and gradients, in a box of 0.1 atoms a cubic unit."""
    edge = (num_atoms / 0.1) ** (1 / 3)
    generator = torch.Generator().manual_seed(0)
    positions = edge * torch.rand(num_atoms, 3, generator=generator, dtype=torch.float32, device="cpu")
    positions = positions.to(device).requires_grad_()
    cell = (edge * torch.eye(3, dtype=torch.float32, device="cpu")).to(device).requires_grad_()
    layer = NeighborList(CUTOFF)

    def search():
        with torch.no_grad():
            layer(positions, cell, True)

    def train():
        torch.autograd.grad(layer(positions, cell, True).distances.sum(), (positions, cell))

    medians = []
    for call in (search, train):
        seconds = []
        for _ in range(1 + REPEATS):
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        medians.append(1e3 * statistics.median(seconds[1:]))
    return medians[0], medians[1]


def self_test(device: torch.device) -> Iterator[tuple[bool, str]]:
    """Lines of the report, and whether what they tell is right."""
    for dtype in (torch.float32, torch.float64):
        for name, check in (("list", check_list), ("gradients", check_gradients)):
            try:
                fault = check(device, dtype)
            except Exception as error:  # whatever it is, it goes into the report
                fault = f"{type(error).__name__}: {error}"
            verdict = "ok" if fault is None else f"WRONG: {fault}"
            yield fault is None, f"  {device}  {str(dtype).removeprefix('torch.')}  {name}: {verdict}"
            if fault is not None and name == "list":
                break  # gradients of a wrong list
    begin = time.perf_counter()
    for num_atoms in SIZES[device.type]:
        if time.perf_counter() - begin > SECONDS_A_DEVICE:
            break
        try:
            bare, train = milliseconds(device, num_atoms)
        except Exception as error:
            yield False, f"  {device}  {num_atoms} atoms: WRONG: {type(error).__name__}: {error}"
            break
        yield True, f"  {device}  {num_atoms:,} atoms: list {bare:.2f} ms, with gradients {train:.2f} ms"


def main(arguments: Sequence[str] = ()) -> int:
    summary, _, rest = __doc__.partition("\n\n")
    argparse.ArgumentParser(
        prog="python -m diffnl", description=summary.replace("``", "`"), epilog=rest
    ).parse_args(arguments)
    for line in facts():
        print(line)
    kernels = _load.KERNELS
    no_gpu = kernels is not None and not kernels.loaded
    right = True
    print("self-test:")
    for device in devices()[:1] if no_gpu else devices():  # the CPU is the first
        for passed, line in self_test(device):
            print(line, flush=True)
            right = right and passed
    if no_gpu:
        verdict = "the CPU is right" if right else "the CPU is WRONG: see above"
        print(f"{verdict}; no GPU works: {_load.no_kernels()}")
        return 1
    print("everything is right" if right else "something is WRONG: see above")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
