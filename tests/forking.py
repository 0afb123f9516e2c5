"""Run by test_concurrency.py in a process of its own: lists in children of one that has used threads."""

import hashlib
import multiprocessing
import sys
import warnings

import torch

import diffnl

# Python 3.12 warns of fork in a process with threads; that is the very situation to test.
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)


def box(num_atoms: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """0.1 atoms/Å³."""
    edge = (num_atoms / 0.1) ** (1 / 3)
    generator = torch.Generator().manual_seed(num_atoms)
    return edge * torch.rand(num_atoms, 3, generator=generator), edge * torch.eye(3), True


def digests(tensors) -> list[str]:
    return [hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in tensors]


def everything(num_atoms: int) -> list[str]:
    """Digests of a list, its vectors again, its gradients, a stress, and lists with a skin."""
    positions, cell, pbc = box(num_atoms)
    found = list(diffnl.neighbor_pairs(positions, cell, pbc, 6.0, sorted=True))
    found.append(diffnl.pair_vectors(positions, cell, *found[:2]))
    inputs = positions.requires_grad_(), cell.requires_grad_()
    pairs = diffnl.neighbor_pairs(*inputs, pbc, 6.0, sorted=True)
    found += torch.autograd.grad(pairs.vectors, inputs, WEIGHTS[num_atoms], retain_graph=True)
    found += diffnl.forces_and_stress((1.0 - pairs.distances / 6.0).pow(3).sum(), *inputs)
    layer = diffnl.NeighborList(6.0, skin=0.5)
    with torch.no_grad():
        for move in (0.0, 0.01):
            found += layer(positions + move, cell, pbc)
    return digests(found)


def child(num_atoms: int, results) -> None:
    results.put((num_atoms, everything(num_atoms)))


SIZES = [int(size) for size in sys.argv[1:]]
torch.set_num_threads(2)
# The parent's threads are made here, and the gradients that children pass on.
WEIGHTS = {n: torch.randn_like(diffnl.neighbor_pairs(*box(n), 6.0).vectors) for n in SIZES}
context = multiprocessing.get_context("fork")
results = context.SimpleQueue()
children = [context.Process(target=child, args=(n, results)) for n in SIZES]
for process in children:
    process.start()
for process in children:
    process.join(60)
    if process.exitcode is None:
        process.kill()
        sys.exit("a forked child hangs")
theirs = dict(results.get() for process in children if process.exitcode == 0)
for n in SIZES:
    print(n, "same bits" if theirs.get(n) == everything(n) else "other bits or none")
