"""More pairs, capacity or systems than memory holds."""

import re
import subprocess
import sys

import pytest
import torch
from compare import assert_same_bits
from refusals import H, R

import diffnl

TOO_MANY = """
import resource, torch, diffnl
near = torch.zeros(1, 3)
before = diffnl.neighbor_pairs(near, torch.eye(3), True, 3.0)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
for _ in range(2):
    try:
        diffnl.neighbor_pairs(near, 0.1 * torch.eye(3), True, 18.0)  # 2.4e7 pairs, 1 GB
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(type(error).__name__, error)
    after = diffnl.neighbor_pairs(near, torch.eye(3), True, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
print("state intact")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a Linux process")
def test_more_pairs_than_memory_holds(cpu_backend):
    script = subprocess.run([sys.executable, "-c", TOO_MANY], capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    assert script.stdout.count("OutOfMemoryError out of memory: `cutoff`") == 2, script.stdout
    assert script.stdout.endswith("state intact\n")


PERIODIC, SLAB = True, (True, True, False)
WRONG_UNIT = {
    "full": (PERIODIC, 1e5, {}, 4e15),
    "half": (PERIODIC, 1e5, {"full": False}, 2e15),
    "several": (PERIODIC, (3.0, 1e5), {}, 4e15),
    "skin": (PERIODIC, 5.0, {"skin": 1e5}, 4e15),
    "slab": (SLAB, 3e6, {}, 1e14),
}


@pytest.mark.parametrize("name", WRONG_UNIT)
def test_a_cutoff_in_the_wrong_unit(name, dtype, gpu_kernels, device):
    """Eight atoms in 4 Å. The number of pairs in the message has been estimated: a count stops much earlier,
    at what memory holds, after seconds."""
    pbc, cutoff, options, pairs = WRONG_UNIT[name]
    if name == "slab" and dtype == torch.float32:
        pytest.skip("float32 cannot tell these images apart")
    generator = torch.Generator().manual_seed(3)
    positions = torch.rand(8, 3, generator=generator, dtype=torch.float64, device="cpu")
    where = (4 * positions).to(device, dtype), H.to(device, dtype)
    layer = diffnl.NeighborList(cutoff, **options)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="`cutoff`.* must leave few enough pairs") as error:
            layer(*where, pbc)
        counted = int(re.search(r"at least (\d+) pairs", str(error.value))[1])
        assert counted > (0.4 if gpu_kernels else 0.9) * pairs
        assert diffnl.neighbor_pairs(*where, pbc, 3.0).mapping.shape[1] > 0


def test_a_capacity_for_a_cutoff_in_the_wrong_unit(device):
    positions, cell = R.double().to(device), 4 * torch.eye(3, dtype=torch.float64, device=device)
    pairs = diffnl.neighbor_pairs(positions, cell, True, 1e5, capacity=100)
    assert pairs.vectors.isnan().any(1).all()
    with pytest.raises(ValueError, match=r"`capacity` must be at least .* \d{14,}; got 100"):
        pairs.check()


@pytest.mark.parametrize("capacity", [10**14, 2**62])
def test_a_capacity_beyond_memory(capacity, device):
    with pytest.raises(torch.OutOfMemoryError, match=f"`capacity` must fit in memory; got {capacity} pairs"):
        diffnl.neighbor_pairs(R.to(device), H.to(device), True, 3.0, capacity=capacity)


@pytest.mark.parametrize("search", [diffnl.neighbor_pairs, diffnl.reference.neighbor_pairs])
def test_a_stray_system_idx_without_a_cell(search, device):
    """Systems without cells are groups of atoms: 10^18 once meant as many cells of zeros."""
    system_idx = torch.tensor([0, 10**18, 0, 3, 10**18, 3, 0, 10**18], device=device)
    positions = (
        torch.rand(8, 3, generator=torch.Generator().manual_seed(4), device="cpu").to(device).requires_grad_()
    )
    pairs = search(positions, None, None, 1.0, system_idx, sorted=True)
    near = search(positions, None, None, 1.0, system_idx.clamp(max=4), sorted=True)
    assert_same_bits(pairs, near)
    assert pairs.mapping.shape[1] > 0
    (gradient,) = torch.autograd.grad(pairs.vectors.square().sum(), positions)
    (expected,) = torch.autograd.grad(near.vectors.square().sum(), positions)
    assert torch.equal(gradient, expected)
    system_idx[2] = -1
    with pytest.raises(ValueError, match=rf"`system_idx` must be in \[0, {10**18 + 1}\); got -1 for atom 2"):
        search(positions, None, None, 1.0, system_idx)
