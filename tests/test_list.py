"""The list against the oracle, the oracle against ASE, and the rules of the contract one by one."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase.neighborlist import primitive_neighbor_list
from compare import (
    as_set,
    assert_list_equals_reference,
    assert_same_bits,
    assert_well_formed,
    bits,
    canonical,
)
from systems import POSES, SYSTEMS, cubic, scatter, tensor

import diffnl

named = pytest.mark.parametrize("name", SYSTEMS)
both_lists = pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
CUBE = tensor(cubic(3.0))
ALL = (True, True, True)


@named
@pytest.mark.parametrize("pose", POSES)
@both_lists
def test_list_equals_reference(name, pose, dtype, full, device):
    system = SYSTEMS[name].posed(pose)
    for cutoff in system.cutoffs:
        assert_list_equals_reference(system.arguments(dtype, device), cutoff, full)


@named
@pytest.mark.parametrize("pose", POSES)
def test_reference_agrees_with_ase(name, pose):
    system = SYSTEMS[name].posed(pose)
    for cutoff in system.cutoffs:
        positions, cell, pbc, system_idx = system.arguments()
        pairs = diffnl.reference.neighbor_pairs(positions, cell, pbc, cutoff, system_idx)
        inside = pairs.vectors.norm(dim=1) < cutoff - 1e-8
        ours = as_set(pairs.mapping[:, inside], pairs.shifts[inside])
        assert ours == ase_pairs(system, cutoff - 1e-8)


def ase_pairs(system, cutoff):
    """{(i, j, S)} by ASE, system by system."""
    found = set()
    for b, cell in enumerate(system.cells()):
        atoms = torch.nonzero(system.owner() == b)[:, 0].numpy()
        pbc = system.flags()[b]
        # ASE ignores open axes too, but fails on those that are coplanar with the periodic ones.
        lattice = (cell * pbc[:, None]).numpy()
        positions = system.positions.numpy()[atoms]
        i, j, S = primitive_neighbor_list("ijS", pbc.numpy(), lattice, positions, cutoff, max_nbins=1000)
        found |= {tuple(row) for row in np.column_stack([atoms[i], atoms[j], S]).tolist()}
    return found


@named
def test_full_list_is_symmetric(name, dtype, device):
    system = SYSTEMS[name].posed("rotated_outside")
    for cutoff in system.cutoffs:
        positions, cell, pbc, system_idx = system.arguments(dtype, device)
        pairs = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx)
        mapping, shifts, vectors = canonical(pairs)
        mirrored = diffnl.Pairs(pairs.mapping.flip(0), -pairs.shifts, -pairs.vectors)
        # By value: -v has -0 where v has 0.
        for ours, theirs in zip((mapping, shifts, vectors), canonical(mirrored), strict=True):
            assert torch.equal(ours, theirs)


def test_no_atom_of_a_crowded_bin_is_its_own_neighbour(dtype, device):
    """More atoms in a bin than the CPU tests at once (1,024), behind candidates from other bins."""
    box = cubic(46.0)
    crowd = torch.cat([scatter(1_100, cubic(1.5), 7), scatter(900, box, 9)])
    positions, cell = crowd.to(device, dtype), tensor(box).to(device, dtype)
    full = diffnl.neighbor_pairs(positions, cell, True, 1.7)
    half = diffnl.neighbor_pairs(positions, cell, True, 1.7, full=False)
    assert full.mapping.shape[1] == 2 * half.mapping.shape[1] > 10**6
    assert not ((full.mapping[0] == full.mapping[1]) & (full.shifts == 0).all(1)).any()


@named
def test_half_list_holds_one_of_each_two(name, dtype, device):
    system = SYSTEMS[name].posed("outside")
    for cutoff in system.cutoffs:
        positions, cell, pbc, system_idx = system.arguments(dtype, device)
        half = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx, full=False)
        for i, j, *S in as_set(half.mapping, half.shifts):
            assert i < j or (i == j and tuple(S) > (0, 0, 0))
        full = diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx)
        kept = as_set(half.mapping, half.shifts)
        assert as_set(full.mapping, full.shifts) == kept | {(j, i, -a, -b, -c) for i, j, a, b, c in kept}
        assert full.mapping.shape[1] == 2 * half.mapping.shape[1]


@pytest.mark.parametrize("name", ["triclinic", "graphene_zero_row", "batch_mixed_pbc", "nothing"])
@both_lists
def test_reference_gives_the_same_bits_on_every_device(name, full, dtype, device):
    system = SYSTEMS[name].posed("rotated_outside")
    here, there = (
        diffnl.reference.neighbor_pairs(r, h, pbc, system.cutoffs[-1], index, full=full)
        for r, h, pbc, index in (system.arguments(dtype, "cpu"), system.arguments(dtype, device))
    )
    assert_well_formed(there, system.arguments(dtype, device)[0])
    assert_same_bits(there, here)


@named
def test_vectors_follow_the_formula(name, dtype, device):
    system = SYSTEMS[name].posed("outside")
    positions, cell, pbc, system_idx = system.arguments(dtype, device)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, system.cutoffs[-1], system_idx)
    h = system.cells().to(device, dtype)[system.owner().to(device)[pairs.mapping[0]]]
    S = pairs.shifts.to(dtype)
    t = (S[:, 0:1] * h[:, 0] + S[:, 1:2] * h[:, 1]) + S[:, 2:3] * h[:, 2]
    assert torch.equal(
        bits(pairs.vectors), bits((positions[pairs.mapping[1]] - positions[pairs.mapping[0]]) + t)
    )
    again = diffnl.pair_vectors(positions, cell, pairs.mapping, pairs.shifts, system_idx)
    assert torch.equal(bits(again), bits(pairs.vectors))


@named
def test_same_bits_again_and_on_any_number_of_threads(name, dtype, threads, cpu_backend):
    system = SYSTEMS[name].posed("rotated")
    positions, cell, pbc, system_idx = system.arguments(dtype)
    threads(1)
    first = diffnl.neighbor_pairs(positions, cell, pbc, system.cutoffs[-1], system_idx)
    for count in (1, 2, 3, 8):
        threads(count)
        assert_same_bits(diffnl.neighbor_pairs(positions, cell, pbc, system.cutoffs[-1], system_idx), first)


@both_lists
def test_large_system_has_the_same_bits_on_any_number_of_threads(full, dtype, threads, cpu_backend):
    cell = tensor(cubic(28.0)).to(dtype)
    positions = scatter(2200, cubic(28.0), 40).to(dtype)
    threads(1)
    first = diffnl.neighbor_pairs(positions, cell, True, 5.0, full=full)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(diffnl.neighbor_pairs(positions, cell, True, 5.0, full=full), first)


def test_large_batch_equals_its_systems_one_by_one(dtype, device):
    generator = torch.Generator().manual_seed(41)
    owner = torch.randint(0, 40, (800,), generator=generator).to(device)
    cells = (CUBE * 2 + torch.randn(40, 3, 3, generator=generator, dtype=torch.float64)).to(device, dtype)
    positions = (9 * torch.randn(800, 3, generator=generator, dtype=torch.float64)).to(device, dtype)
    whole = diffnl.neighbor_pairs(positions, cells, True, 4.0, owner, sorted=True)
    parts = []
    for b in range(40):
        atoms = torch.nonzero(owner == b)[:, 0]
        one = diffnl.neighbor_pairs(positions[atoms], cells[b], True, 4.0, sorted=True)
        parts.append(diffnl.Pairs(atoms[one.mapping], one.shifts, one.vectors))
    joined = diffnl.Pairs(
        torch.cat([part.mapping for part in parts], dim=1),
        torch.cat([part.shifts for part in parts]),
        torch.cat([part.vectors for part in parts]),
    )
    assert_same_bits(whole, canonical(joined))


def test_cutoff_is_strict(dtype, device):
    positions = torch.zeros(1, 3, dtype=dtype, device=device)
    cell = CUBE.to(device, dtype)
    above = torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(4.0, dtype=dtype)).item()
    assert diffnl.neighbor_pairs(positions, cell, True, 3.0).mapping.shape == (2, 0)
    assert diffnl.neighbor_pairs(positions, cell, True, above).mapping.shape == (2, 6)


def test_cutoff_is_squared_in_the_dtype_of_positions(dtype, device):
    # 0.1 is not representable: the edge moves with the rounding of cutoff * cutoff, and so must the list.
    grid = torch.arange(1, 400, dtype=torch.float64)
    for step in (0.1, 0.3, 0.7, 1.1):
        positions = torch.zeros(400, 3, dtype=torch.float64)
        positions[1:, 0] = step * grid
        arguments = (positions.to(device, dtype), None, None, None)
        for cutoff in (step, 3 * step, 7 * step):
            assert_list_equals_reference(arguments, cutoff, full=True)


@pytest.mark.parametrize("name", ["bulk", "triclinic", "batch_interleaved", "open_cluster", "slab_1A_thick"])
def test_permuting_atoms_permutes_the_list(name, dtype, device):
    system = SYSTEMS[name]
    positions, cell, pbc, system_idx = system.arguments(dtype, device)
    new_to_old = torch.randperm(len(positions), generator=torch.Generator().manual_seed(42)).to(device)
    index = None if system_idx is None else system_idx[new_to_old]
    before = diffnl.neighbor_pairs(positions, cell, pbc, system.cutoffs[-1], system_idx)
    after = diffnl.neighbor_pairs(positions[new_to_old], cell, pbc, system.cutoffs[-1], index)
    back = diffnl.Pairs(new_to_old[after.mapping], after.shifts, after.vectors)
    assert_same_bits(canonical(back), canonical(before))


def test_moving_atoms_by_lattice_vectors_only_moves_shifts(device):
    # Powers of two keep r + n @ h exact, so the vectors must be the same bits.
    cell = tensor(cubic(4.0)).to(device)
    positions = (scatter(20, cubic(4.0), 43) * 1024).round().to(device) / 1024
    cells = torch.randint(-9, 10, (20, 3), generator=torch.Generator().manual_seed(44)).to(device)
    here = diffnl.neighbor_pairs(positions, cell, True, 5.0)
    there = diffnl.neighbor_pairs(positions + cells.double() @ cell, cell, True, 5.0)
    i, j = there.mapping
    unmoved = diffnl.Pairs(there.mapping, (there.shifts + cells[j] - cells[i]).int(), there.vectors)
    assert_same_bits(canonical(unmoved), canonical(here))


@pytest.mark.parametrize("cutoff", [1, 1.0, np.float32(1.0), np.float64(1.0)], ids=lambda c: type(c).__name__)
def test_cutoff_may_be_any_real_number(cutoff):
    positions = tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    assert diffnl.NeighborList(cutoff)(positions).mapping.tolist() == [[0, 1], [1, 0]]


def test_module_and_function_are_the_same(device):
    positions, cell, pbc, system_idx = SYSTEMS["batch_mixed_pbc"].arguments(torch.float64, device)
    for options in ({}, {"full": False}, {"sorted": True}, {"full": False, "sorted": True}):
        module = diffnl.NeighborList(4.0, **options)(positions, cell, pbc, system_idx)
        assert_same_bits(module, diffnl.neighbor_pairs(positions, cell, pbc, 4.0, system_idx, **options))


def test_distances(device, dtype):
    positions, cell, pbc, _ = SYSTEMS["triclinic"].arguments(dtype, device)
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, 5.0)
    assert pairs.distances.shape == (pairs.mapping.shape[1],) and pairs.distances.dtype == dtype
    torch.testing.assert_close(pairs.distances, torch.linalg.vector_norm(pairs.vectors, dim=1))
    assert pairs.distances is pairs.distances


# ----- what other lists get wrong --------------------------------------------------------------------------


def test_small_cells_keep_every_image(dtype, device):
    """The number of pairs of a lattice of points is a matter of counting."""
    for cutoff in (2.5, 5.5, 9.5):
        n = math.ceil(cutoff)
        inside = sum(
            x * x + y * y + z * z < cutoff * cutoff
            for x in range(-n, n + 1)
            for y in range(-n, n + 1)
            for z in range(-n, n + 1)
        )
        positions = torch.full((1, 3), 0.25, dtype=dtype, device=device)
        pairs = diffnl.neighbor_pairs(positions, tensor(cubic(1.0)).to(device, dtype), True, cutoff)
        assert pairs.mapping.shape[1] == inside - 1


def test_slab_loses_no_pairs(dtype, device):
    """A slab in a periodic box with vacuum has the pairs of the slab with an open axis."""
    positions = scatter(80, [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 2.0]], 45).to(device, dtype)
    boxed = torch.diag(tensor([9.0, 9.0, 40.0])).to(device, dtype)
    flat = torch.diag(tensor([9.0, 9.0, 0.0])).to(device, dtype)
    with_vacuum = diffnl.neighbor_pairs(positions, boxed, ALL, 5.0, sorted=True)
    with_open_axis = diffnl.neighbor_pairs(positions, flat, (True, True, False), 5.0, sorted=True)
    assert_same_bits(with_open_axis, with_vacuum)
    assert with_vacuum.mapping.shape[1] > 1000


def test_interleaved_systems_never_mix(dtype, device):
    positions, cell, pbc, system_idx = SYSTEMS["batch_interleaved"].arguments(dtype, device)
    i, j = diffnl.neighbor_pairs(positions, cell, pbc, 5.0, system_idx).mapping
    assert len(i) > 0 and torch.equal(system_idx[i], system_idx[j])


def test_integer_dtype_of_system_idx_does_not_matter(device):
    positions, cell, pbc, system_idx = SYSTEMS["batch_interleaved"].arguments(torch.float64, device)
    expected = diffnl.neighbor_pairs(positions, cell, pbc, 5.0, system_idx)
    for integer in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert_same_bits(diffnl.neighbor_pairs(positions, cell, pbc, 5.0, system_idx.to(integer)), expected)


# ----- memory ----------------------------------------------------------------------------------------------

SPARSE = """
import torch, diffnl

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

near = torch.tensor([[1.0, 1.0, 1.0], [9.5, 1.0, 1.0], [5.0, 5.0, 5.0]])
diffnl.neighbor_pairs(near, 10 * torch.eye(3), True, 2.0)
before = peak()
for cell, pbc, edge in ((1e4 * torch.eye(3), True, 1e4), (None, None, 1e6)):
    far = torch.tensor([[1.0, 1.0, 1.0], [edge - 0.5, 1.0, 1.0], [edge / 2] * 3])
    diffnl.neighbor_pairs(far, cell, pbc, 2.0)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sparse_box_allocates_almost_nothing(cpu_backend):
    script = subprocess.run([sys.executable, "-c", SPARSE], capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    assert float(script.stdout) < 16, "MB; a grid over the empty box would take gigabytes"


def test_no_pairs_are_still_three_tensors(dtype, device):
    for name in ("nothing", "nothing_open", "one_free_atom", "batch_all_empty"):
        positions, cell, pbc, system_idx = SYSTEMS[name].arguments(dtype, device)
        pairs = diffnl.neighbor_pairs(positions, cell, pbc, 0.01, system_idx)
        assert_well_formed(pairs, positions)
        assert pairs.mapping.shape[1] == 0 and pairs.distances.shape == (0,)
