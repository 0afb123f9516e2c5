"""diffnl and its peers behind one call, and the steps that all of them are timed on.

A library is a function `run(positions, cell, system, with_vectors) -> (mapping, shifts, vectors)`: the full
list as (2, P) pairs and (P, 3) shifts and, `with_vectors`, the differentiable (P, 3) vectors. Libraries
that compute no differentiable vectors get them from plain torch (`plain_vectors`), as their users do: in two
ways, with indexing and with `index_select`, of which either is the faster one in some step.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from harness import CUTOFF, System, describe, gpu_peak_mb, is_gpu, make_system, peak_growth_mb, version_of

Run = Callable[[torch.Tensor, torch.Tensor, System, bool], tuple]
GATHERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index_select": lambda rows, index: rows.index_select(0, index),
    "indexing": lambda rows, index: rows[index],
}
OWN = "own"  # the one way of a library that computes its vectors itself
# For libraries that want a bound. Atoms of the workload have 89 neighbours, 3 the standard deviation, at most
# 106 of 10⁶; where it does not suffice the pairs that are missing have the library refused.
MAX_NEIGHBORS = 112


@dataclass(frozen=True)
class Library:
    """How a library is reached and what it can run."""

    make: Callable[[Callable | None], Run]  # takes the gather of `plain_vectors`
    distribution: str
    devices: tuple[str, ...] = ("cpu",)
    batches: bool = False
    max_atoms: int | None = None  # above it one call takes minutes
    plain: bool = False  # its vectors are those of `plain_vectors`
    stacked: bool = False  # wants `cell` as (B, 3, 3) and `pbc` as (B, 3) for one box too

    def view(self, system: System) -> System:
        """The system in the shapes this library wants, so that the timed call need not make them."""
        if not self.stacked:
            return system
        sweep = tuple(self.view(part) for part in system.sweep)
        return replace(system, cell=system.cell.reshape(-1, 3, 3), pbc=system.pbc.reshape(-1, 3), sweep=sweep)

    @property
    def ways(self) -> tuple[str, ...]:
        """The names of the ways to its vectors."""
        return tuple(GATHERS) if self.plain else (OWN,)

    def run(self, way: str) -> Run:
        """The library with its vectors made that way; raises where it is not installed."""
        return self.make(GATHERS.get(way))

    def refusal(self, system: System) -> str | None:
        """Why this library does not run on a system, None if it does."""
        device = system.positions.device.type
        if device not in self.devices:
            return f"no {device} implementation"
        if system.systems > 1 and not self.batches:
            return "no batches"
        if self.max_atoms is not None and system.atoms > self.max_atoms:
            return f"skipped above {self.max_atoms:,} atoms: too slow"
        return None


def plain_vectors(gather, positions, cell, mapping, shifts, system_idx):
    """r_j - r_i + S @ h in torch ops: (P, 3)."""
    i, j = mapping[0].long(), mapping[1].long()
    shifts = shifts.to(positions.dtype)
    if cell.dim() == 3 and len(cell) == 1:
        cell = cell[0]
    if cell.dim() == 2:
        translations = shifts @ cell
    else:
        translations = torch.einsum("pa,pab->pb", shifts, gather(cell, system_idx[i]))
    return gather(positions, j) - gather(positions, i) + translations


def _diffnl(gather) -> Run:
    import diffnl

    neighbor_list = diffnl.NeighborList(CUTOFF)

    def run(positions, cell, system, with_vectors):
        return neighbor_list(positions, cell, system.pbc, system.system_idx)

    return run


def _vesin(gather) -> Run:
    from vesin import NeighborList

    neighbor_list = NeighborList(cutoff=CUTOFF, full_list=True, sorted=False)

    def run(positions, cell, system, with_vectors):
        # Flags on the device of the positions: from a plain True it would copy some there at every call.
        pairs, shifts = neighbor_list.compute(positions.detach(), cell.detach(), system.pbc, "PS", copy=False)
        mapping = pairs.view(torch.int64).t()  # unsigned indices, which torch does not index with
        vectors = plain_vectors(gather, positions, cell, mapping, shifts, None) if with_vectors else None
        return mapping, shifts, vectors

    return run


def _vesin_torch(gather) -> Run:
    from vesin_torch import NeighborList

    neighbor_list = NeighborList(cutoff=CUTOFF, full_list=True)

    def run(positions, cell, system, with_vectors):
        result = neighbor_list.compute(positions, cell, True, "PSD" if with_vectors else "PS", copy=True)
        return result[0].t(), result[1], (result[2] if with_vectors else None)

    return run


def _through_numpy(search, gather) -> Run:
    """For `search(positions, cell) -> i, j, S` on float64 arrays, the only precision of these libraries."""

    def run(positions, cell, system, with_vectors):
        i, j, shifts = search(positions.detach().double().numpy(), cell.detach().double().numpy())
        mapping = torch.from_numpy(np.stack([i, j]).astype(np.int64))
        shifts = torch.from_numpy(np.ascontiguousarray(shifts))
        vectors = plain_vectors(gather, positions, cell, mapping, shifts, None) if with_vectors else None
        return mapping, shifts, vectors

    return run


def _matscipy(gather) -> Run:
    from matscipy.neighbours import neighbour_list

    def search(positions, cell):
        return neighbour_list("ijS", positions=positions, cell=cell, pbc=[True] * 3, cutoff=CUTOFF)

    return _through_numpy(search, gather)


def _ase(gather) -> Run:
    from ase.neighborlist import primitive_neighbor_list

    def search(positions, cell):
        return primitive_neighbor_list("ijS", [True] * 3, cell, positions, CUTOFF)

    return _through_numpy(search, gather)


def _pymatgen(gather) -> Run:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    periodic = np.ones(3, dtype=np.int64)

    def search(positions, cell):
        i, j, shifts, distances = find_points_in_spheres(
            positions, positions, r=CUTOFF, pbc=periodic, lattice=cell, tol=1e-8
        )
        pairs = distances > 1e-8  # it lists every atom as its own neighbour
        return i[pairs], j[pairs], shifts[pairs]

    return _through_numpy(search, gather)


def _torch_nl(gather) -> Run:
    from torch_nl import compute_neighborlist

    def run(positions, cell, system, with_vectors):
        batch = system.system_idx
        if batch is None:
            batch = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        rows = cell.detach().reshape(-1, 3)
        mapping, _, shifts = compute_neighborlist(
            CUTOFF, positions.detach(), rows, system.pbc.reshape(-1, 3), batch, False
        )
        vectors = plain_vectors(gather, positions, cell, mapping, shifts, batch) if with_vectors else None
        return mapping, shifts, vectors

    return run


def _torchsim(gather) -> Run:
    from torch_sim.neighbors.torch_nl import torch_nl_linked_cell

    def run(positions, cell, system, with_vectors):
        batch = system.system_idx
        if batch is None:
            batch = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        cutoff = torch.tensor(CUTOFF, device=positions.device, dtype=positions.dtype)
        mapping, _, shifts = torch_nl_linked_cell(
            positions.detach(), cell.detach(), system.pbc, cutoff, batch
        )
        vectors = plain_vectors(gather, positions, cell, mapping, shifts, batch) if with_vectors else None
        return mapping, shifts, vectors

    return run


def _nvalchemi(method: str | None) -> Callable[[Callable], Run]:
    def make(gather) -> Run:
        from nvalchemiops.torch.neighbors import neighbor_list

        def run(positions, cell, system, with_vectors):
            options = {"method": method, "return_neighbor_list": True}
            if with_vectors:
                options["return_vectors"] = True
            if system.systems > 1:
                options["batch_ptr"] = system.batch_ptr
                options["batch_idx"] = system.batch_idx
            if method != "cluster_tile":
                options["max_neighbors"] = MAX_NEIGHBORS
            result = neighbor_list(positions, CUTOFF, cell=cell, pbc=system.pbc, **options)
            return result[0], result[2], (result[3] if with_vectors else None)

        return run

    return make


LIBRARIES: dict[str, Library] = {
    "diffnl": Library(_diffnl, "diffnl", ("cpu", "cuda"), batches=True),
    "vesin": Library(_vesin, "vesin", ("cpu", "cuda"), plain=True),
    "vesin-torch": Library(_vesin_torch, "vesin-torch", ("cpu", "cuda")),
    "matscipy": Library(_matscipy, "matscipy", plain=True),
    "pymatgen": Library(_pymatgen, "pymatgen-core", plain=True),
    "ase": Library(_ase, "ase", max_atoms=11_000, plain=True),
    "torch_nl": Library(_torch_nl, "torch-nl", ("cpu", "cuda"), batches=True, max_atoms=11_000, plain=True),
    "torchsim": Library(
        _torchsim, "torch-sim-atomistic", ("cuda",), batches=True, max_atoms=40_000, plain=True, stacked=True
    ),
    "nvalchemi": Library(_nvalchemi(None), "nvalchemi-toolkit-ops", ("cuda",), batches=True, stacked=True),
    "nvalchemi-cell": Library(
        _nvalchemi("cell_list"), "nvalchemi-toolkit-ops", ("cuda",), batches=True, stacked=True
    ),
    "nvalchemi-tile": Library(
        _nvalchemi("cluster_tile"), "nvalchemi-toolkit-ops", ("cuda",), batches=True, stacked=True
    ),
}


def load(names: list[str]) -> tuple[dict[str, dict[str, Run]], dict[str, str], dict[str, str]]:
    """Imports libraries: by name the runs by way, the versions, and the reason of those that are missing."""
    runs, versions, missing = {}, {}, {}
    for name in names:
        try:
            runs[name] = {way: LIBRARIES[name].run(way) for way in LIBRARIES[name].ways}
            versions[name] = version_of(LIBRARIES[name].distribution)
        except Exception as error:  # a half-installed peer can fail in any way on import
            missing[name] = describe(error)
    return runs, versions, missing


# The steps. Each takes a run and a system, and returns the call to time.


def in_turn(step: Callable[[Run, System], Callable[[], object]]):
    """The step for all parts of a system, one after the other in one call."""

    def prepare(run: Run, system: System) -> Callable[[], object]:
        calls = [step(run, part) for part in system.parts]

        def every() -> None:
            for call in calls:
                call()

        return calls[0] if len(calls) == 1 else every

    return prepare


@in_turn
def list_step(run: Run, system: System):
    """Pairs and shifts of the full list, nothing requires a gradient."""
    return lambda: run(system.positions, system.cell, system, False)


@in_turn
def vectors_step(run: Run, system: System):
    """The list with vectors that can be differentiated to positions and cell."""
    positions, cell = system.leaves()
    return lambda: run(positions, cell, system, True)


@in_turn
def backward_step(run: Run, system: System):
    """Gradients to positions and cell of a weighted sum of the vectors, which are there already."""
    positions, cell = system.leaves()
    vectors = run(positions, cell, system, True)[2]
    weights = torch.randn_like(vectors)
    return lambda: torch.autograd.grad(vectors, (positions, cell), weights, retain_graph=True)


@in_turn
def train_step(run: Run, system: System):
    """Vectors, the energy sum of 1/sqrt(d² + 1), its gradients, and the gradients of a loss on those."""
    positions, cell = system.leaves()

    def train():
        vectors = run(positions, cell, system, True)[2]
        energy = (vectors.square().sum(-1) + 1).rsqrt().sum()
        first = torch.autograd.grad(energy, (positions, cell), create_graph=True)
        loss = first[0].square().sum() + first[1].square().sum()
        return torch.autograd.grad(loss, (positions, cell))

    return train


STEPS: dict[str, Callable[[Run, System], Callable[[], object]]] = {
    "list": list_step,
    "vectors": vectors_step,
    "backward": backward_step,
    "train": train_step,
}


def peak_memory(
    name: str,
    ways: dict[str, str],
    size: str,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int,
    threads: int,
) -> dict[str, float | None]:
    """By how many MB each step of `ways` raises the peak memory; on the CPU measured in a fresh process."""
    arguments = (name, ways, size, dtype, device, seed, threads)
    if is_gpu(device):
        peaks = gpu_memory(name, ways, LIBRARIES[name].view(make_system(size, dtype, device, seed)))
        return {step: peaks[f"{step}_mb"] for step in ways}
    # With a fixed threshold glibc returns freed blocks at once, so that the peak is what was in use and not
    # what the allocator kept for later. Left alone it raises the threshold as it goes, differently for
    # every library.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_memory_here, *arguments).result()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _peak_memory_here(name, ways, size, dtype, device, seed, threads):
    torch.set_num_threads(threads)
    small, system = make_system("512", dtype, device, seed), make_system(size, dtype, device, seed)
    peaks = {}
    for step, way in ways.items():
        run = LIBRARIES[name].run(way)
        STEPS[step](run, small)()  # starts threads and loads code, which belong to no step
        call = STEPS[step](run, system)
        peaks[step] = peak_growth_mb(call, device)
        call = None
    return peaks


def gpu_memory(name: str, ways: dict[str, str], system: System) -> dict[str, float]:
    """Peak memory of each step of `ways` on a GPU, in MB: `gpu_peak_mb` as columns of a row.

    The library is made anew for each step, so that buffers it keeps from call to call count too.
    """
    columns = {}
    for step, way in ways.items():
        run = LIBRARIES[name].run(way)
        peaks = gpu_peak_mb(STEPS[step](run, system), system.positions.device)
        columns |= {f"{step}_mb": peaks["growth"], f"{step}_peak_mb": peaks["peak"]}
        columns[f"{step}_outside_mb"] = peaks["outside"]
        run = None  # its buffers go before the next step's come
    return columns
