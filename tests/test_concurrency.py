"""The layer in DataLoader workers, in several threads, in DDP, and pickled."""

import copy
import gc
import io
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_equal_bits, assert_same_bits
from systems import SYSTEMS, cubic, scatter, tensor

import diffnl


class Structures(torch.utils.data.Dataset):
    """Named systems, and the list of each."""

    def __init__(self, names, layer):
        self.names, self.layer = names, layer

    def __len__(self):
        return len(self.names)

    def __getitem__(self, n):
        return self.names[n], self.layer(*SYSTEMS[self.names[n]].arguments())


# Python warns of fork in a process with threads; that is the very situation to test.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method, threads):
    threads(2)
    layer = diffnl.NeighborList(4.0, sorted=True)
    big = scatter(3000, cubic(30.0), 90)
    diffnl.neighbor_pairs(big, tensor(cubic(30.0)), True, 5.0)  # the parent's threads exist before the fork
    names = ["fcc", "triclinic", "batch_interleaved", "bulk", "one_atom_tiny", "nothing"]
    loader = torch.utils.data.DataLoader(
        Structures(names, layer), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=100
    )
    seen = []
    for name, pairs in loader:
        seen.append(name)
        assert_same_bits(pairs, layer(*SYSTEMS[name].arguments()))
        assert torch.equal(pairs.distances, pairs.vectors.square().sum(-1).sqrt())
    assert seen == names


# What parallel.h takes from torch.
STAND_IN = """
#pragma once
#include <chrono>
#include <cstdint>
#include <thread>

inline int regions_on_threads = 0, late_regions = 0;
namespace torch::stable {
inline uint32_t get_num_threads() { return 2; }
template <typename F>
void parallel_for(int64_t first, int64_t last, int64_t, const F& f) {
  if (regions_on_threads++ < late_regions) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  f(first, last);
}
}  // namespace torch::stable
"""
REGIONS = """
#include "parallel.h"
#include <cstdio>
#include <cstdlib>

// Arguments: the number of regions, the rows of each, their work in ns, and how many of those with threads,
// from the first on, are late. Prints a 2 for a region that threads ran, a 1 for one that the caller ran.
int main(int, char** arguments) {
  const int64_t regions = std::atoll(arguments[1]), rows = std::atoll(arguments[2]);
  const double work = std::atof(arguments[3]);
  late_regions = std::atoi(arguments[4]);
  for (int64_t n = 0; n < regions; ++n) {
    const int before = regions_on_threads;
    int64_t seen = 0;
    const auto count = [&](int64_t first, int64_t last) { seen += last - first; };
    diffnl::parallel_rows(rows, work, count);
    if (seen != rows) return 1;
    std::putchar(regions_on_threads > before ? '2' : '1');
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles a header of csrc/")
def test_after_late_threads_small_regions_run_on_one(tmp_path):
    """Where other programs keep the cores busy, a list of 60 atoms took 130 times longer with two threads."""
    stand_in = tmp_path / "torch/csrc/stable/ops.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(STAND_IN)
    source, program = tmp_path / "regions.cpp", tmp_path / "regions"
    source.write_text(REGIONS)
    csrc = Path(__file__).parents[1] / "csrc"
    command = ["g++", "-std=c++20", "-O1", f"-I{csrc}", f"-I{tmp_path}", source, "-o", program, "-pthread"]
    subprocess.run(command, check=True)

    def runs(regions, rows, work, late):
        return subprocess.check_output([program, *map(str, (regions, rows, work, late))], text=True)

    small, always = 100e3, 2e6
    # A pause ends for lists of fewer rows than one thread would take as a block.
    for rows in (60, 216, 5000):
        assert runs(20, rows, small, 0) == "2" * 20
        assert runs(60, rows, small, 60) == "2" + 8 * "1" + "2" + 16 * "1" + "2" + 32 * "1" + "2"
        assert runs(31, rows, small, 1) == "2" + 8 * "1" + 22 * "2"
        assert runs(20, rows, always, 20) == "2" * 20
        assert runs(20, rows, 10e3, 0) == "1" * 20
    always_late = runs(30_000, 60, small, 30_000)
    assert always_late.count("2") < 20 and 4096 * "1" + "2" in always_late and 4097 * "1" not in always_late


FORKING = Path(__file__).parent / "forking.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("num_atoms", ["50", "5000"])
def test_a_forked_child_of_a_process_that_has_used_threads(num_atoms, cpu_backend):
    """The child waited for ever for threads that only its parent had, in the list and in the gradients."""
    command = [sys.executable, str(FORKING), num_atoms]
    script = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert script.returncode == 0, script.stdout + script.stderr
    assert script.stdout == f"{num_atoms} same bits\n"


NUMBER_OF_THREADS = """
import os, torch, diffnl
torch.set_num_threads(2)
def threads_after(num_atoms, skin):
    edge = (num_atoms / 0.1) ** (1 / 3)
    positions = edge * torch.rand(num_atoms, 3)
    cell = edge * torch.eye(3)
    inputs = positions.requires_grad_(), cell.requires_grad_()
    diffnl.NeighborList(3.5, skin=skin)(*inputs, True)
    vectors = diffnl.neighbor_pairs(*inputs, True, 3.5).vectors
    grad = torch.empty(vectors.shape).numpy()
    torch.autograd.grad(vectors, inputs, torch.from_numpy(grad))
    return len(os.listdir("/proc/self/task"))
torch.rand(3).requires_grad_().sum().backward()  # whatever threads autograd wants
before = threads_after(1, 0.5)
print(*(threads_after(*one) - before for one in ((20, 0.0), (10, 0.5), (3000, 0.5))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_list_of_20_atoms_makes_no_threads(cpu_backend):
    """Two threads pay from 20 us of work on. A skin searches further, and sorts what it finds."""
    script = subprocess.run(
        [sys.executable, "-c", NUMBER_OF_THREADS], capture_output=True, text=True, timeout=100
    )
    assert script.stdout == "0 0 1\n", script.stdout + script.stderr


def test_several_python_threads_at_once(device):
    layer = diffnl.NeighborList(4.0)
    names = [name for name in SYSTEMS if not name.startswith("one_atom")] * 4
    arguments = [SYSTEMS[name].arguments(device=device) for name in names]
    expected = [layer(*a) for a in arguments]
    with ThreadPoolExecutor(8) as pool:
        for ours, theirs in zip(pool.map(lambda a: layer(*a), arguments), expected, strict=True):
            assert_same_bits(ours, theirs)


def test_backward_in_several_python_threads_at_once(device):
    layer = diffnl.NeighborList(5.0)

    def gradients(seed):
        positions = scatter(300, cubic(14.0), seed).to(device).requires_grad_()
        cell = tensor(cubic(14.0)).to(device).requires_grad_()
        energy = layer(positions, cell, True).vectors.pow(3).sum()
        first = torch.autograd.grad(energy, (positions, cell), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (positions, cell))

    expected = [gradients(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for ours, theirs in zip(pool.map(gradients, range(8)), expected, strict=True):
            assert_equal_bits(ours, theirs)


def test_errors_in_one_thread_do_not_reach_another(device):
    good = torch.rand(50, 3, generator=torch.Generator().manual_seed(91)).to(device)
    bad = good.clone()
    bad[17] = float("nan")
    expected = diffnl.neighbor_pairs(good, None, None, 0.5)

    def attempt(n):
        if n % 2:
            with pytest.raises(ValueError, match="`positions` must be finite.*atom 17"):
                diffnl.neighbor_pairs(bad, None, None, 0.5)
        else:
            assert_same_bits(diffnl.neighbor_pairs(good, None, None, 0.5), expected)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(attempt, range(64)))


# ----- pickling and module state ---------------------------------------------------------------------------


def test_pickle_and_deepcopy_of_the_layer():
    layer = diffnl.NeighborList(3.7, full=False, sorted=True)
    arguments = SYSTEMS["triclinic"].arguments()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ]
    for other in copies:
        assert repr(other) == repr(layer)
        assert_same_bits(other(*arguments), layer(*arguments))


def test_pickle_and_deepcopy_of_pairs(device):
    pairs = diffnl.NeighborList(3.7)(*SYSTEMS["triclinic"].arguments(device=device))
    for other in (copy.deepcopy(pairs), pickle.loads(pickle.dumps(pairs))):
        assert type(other) is diffnl.Pairs
        assert_same_bits(other, pairs)
        assert torch.equal(other.distances, pairs.distances)


def test_the_layer_has_no_state():
    layer = diffnl.NeighborList(3.7)
    assert list(layer.parameters()) == [] and list(layer.buffers()) == [] and layer.state_dict() == {}
    layer.load_state_dict({})
    assert layer.to(torch.float64).half().cutoff == 3.7
    positions = torch.rand(5, 3, generator=torch.Generator().manual_seed(92))
    assert layer(positions).vectors.dtype == torch.float32, "the list follows its input, not the module"


def test_repr_names_the_options():
    assert repr(diffnl.NeighborList(3.7, full=False)) == "NeighborList(cutoff=3.7, full=False, sorted=False)"


# ----- DDP -------------------------------------------------------------------------------------------------


class Potential(torch.nn.Module):
    """Energies (B,) of a two-parameter pair potential over the layer."""

    def __init__(self):
        super().__init__()
        self.neighbors = diffnl.NeighborList(3.5)
        self.depth = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.width = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, positions, cell, system_idx):
        pairs = self.neighbors(positions, cell, True, system_idx)
        each = self.depth * torch.exp(-((pairs.distances / self.width) ** 2))
        return each.new_zeros(len(cell)).index_add(0, system_idx[pairs.mapping[0]], each)


def force_and_stress_loss(model, systems):
    """Mean over systems of energy, force and stress terms, as a trainer has it."""
    positions = torch.cat([scatter(n, cubic(3.0), n) for n in systems]).requires_grad_()
    cell = tensor(cubic(3.0)).repeat(len(systems), 1, 1).requires_grad_()
    owner = torch.repeat_interleave(torch.arange(len(systems)), torch.tensor(systems))
    energy = model(positions, cell, owner)
    forces, stress = diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)
    return (energy.square().sum() + forces.square().sum() + stress.square().sum()) / len(systems)


def train_step(rank, folder):
    """One process of two: its half of the systems, gradients averaged by DDP."""
    model = torch.nn.parallel.DistributedDataParallel(Potential())
    for _ in range(2):  # a second step finds the reducer ready again
        model.zero_grad()
        force_and_stress_loss(model, [[5, 6], [7, 4]][rank]).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/gradients_{rank}.pt")


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        train_step(rank, folder)
        # DDP is part of cycles that hold the group, whose threads must end before the process does.
        gc.collect()
    finally:
        dist.destroy_process_group()


def test_ddp_on_two_processes_equals_one(tmp_path):
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    model = Potential()
    force_and_stress_loss(model, [5, 6, 7, 4]).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"gradients_{rank}.pt")
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=1e-12, atol=1e-12)
