"""What only a GPU can show, bits: those of the CPU at size, and the same again however often.

The rest of the suite runs on a GPU too, through its `device` fixture. Tests in test_gpu_*.py fill the memory
of the GPU and watch its streams: no other process should use it meanwhile, so run them without pytest-xdist.
"""

import math

import pytest
import torch
from compare import assert_adjoint, assert_equal_bits, assert_same_bits, order
from gpu_steps import (
    LARGE,
    assert_same,
    both_lists,
    find,
    leaves_of,
    random_like,
    sizeable,
    whole_step,
)
from systems import SYSTEMS

import diffnl

named = pytest.mark.parametrize("name", SYSTEMS)


# ----- the bits of the CPU ---------------------------------------------------------------------------------


def assert_list_of_the_cpu(system, cutoff, dtype, full, gpu):
    expected = find(system.arguments(dtype, "cpu"), cutoff, full=full, sorted=True)
    arguments = system.arguments(dtype, gpu)
    in_order = find(arguments, cutoff, full=full, sorted=True)
    assert in_order.vectors.is_cuda
    assert_same_bits(in_order, expected)
    mapping, shifts, vectors = find(arguments, cutoff, full=full)
    assert (mapping[0].diff() >= 0).all()
    permutation = order(mapping, shifts)
    assert_same([mapping[:, permutation], shifts[permutation], vectors[permutation]], in_order)
    return expected


@named
@both_lists
def test_list_is_that_of_the_cpu(name, full, dtype, gpu):
    for cutoff in SYSTEMS[name].cutoffs:
        assert_list_of_the_cpu(SYSTEMS[name], cutoff, dtype, full, gpu)


@sizeable
@both_lists
def test_large_list_is_that_of_the_cpu(name, full, dtype, gpu):
    pairs = assert_list_of_the_cpu(LARGE[name], LARGE[name].cutoffs[0], dtype, full, gpu)
    assert pairs.mapping.shape[1] > 1000


@sizeable
def test_vectors_of_a_list_are_those_of_the_cpu(name, dtype, gpu):
    positions, cell, pbc, system_idx = here = LARGE[name].arguments(dtype, "cpu")
    mapping, shifts, expected = find(here, LARGE[name].cutoffs[0])
    cell = positions.new_zeros(3, 3) if cell is None else cell
    there = [None if t is None else t.to(gpu) for t in (positions, cell, mapping, shifts, system_idx)]
    assert_equal_bits([diffnl.pair_vectors(*there)], [expected])
    # An int64 cell shift and an int32 mapping are the same list.
    there[2], there[3] = there[2].int(), there[3].long()
    assert_equal_bits([diffnl.pair_vectors(*there)], [expected])


@sizeable
@both_lists
@pytest.mark.parametrize("source", ["list", "vectors"])
def test_adjoint_is_its_formula_and_the_cpus(source, name, full, dtype, gpu):
    """Against sums in float64 within rounding; the CPU's are held to the same bound."""
    arguments = LARGE[name].arguments(dtype, gpu)
    _, cell, pbc, system_idx = arguments
    pbc = False if cell is None else pbc
    positions, cell = leaves = leaves_of(arguments)
    mapping, shifts, vectors = find(
        (*leaves, pbc, system_idx), LARGE[name].cutoffs[0], full=full, sorted=True
    )
    if source == "vectors":
        shuffled = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(11)).to(gpu)
        mapping, shifts = mapping[:, shuffled], shifts[shuffled]
        vectors = diffnl.pair_vectors(positions, cell, mapping, shifts, system_idx)
    g = random_like(vectors, 12)
    gradients = torch.autograd.grad(vectors, leaves, g)
    sizes = len(positions), cell.numel() // 9
    assert_adjoint(gradients, g, mapping, shifts, system_idx, *sizes)

    leaves = [t.detach().cpu().requires_grad_() for t in leaves]
    mapping, shifts, g = mapping.cpu(), shifts.cpu(), g.cpu()
    system_idx = None if system_idx is None else system_idx.cpu()
    vectors = diffnl.pair_vectors(*leaves, mapping, shifts, system_idx)
    on_the_cpu = torch.autograd.grad(vectors, leaves, g)
    assert_adjoint(on_the_cpu, g, mapping, shifts, system_idx, *sizes)


# ----- the same bits again ---------------------------------------------------------------------------------


def poison(gpu):
    """Leaves NaN in the memory that the next calls get: nothing may depend on what was there before."""
    for size in (2**10, 2**16, 2**20, 2**24):
        torch.full((size,), math.nan, device=gpu)


@both_lists
@pytest.mark.parametrize("name", ["bulk", "sizes_very_different", "clumps"])
def test_a_hundred_repeats_have_the_same_bits(name, full, dtype, gpu):
    arguments = LARGE[name].arguments(dtype, gpu)
    expected = whole_step(arguments, LARGE[name].cutoffs[0], full)
    for _ in range(100):
        poison(gpu)
        assert_same(whole_step(arguments, LARGE[name].cutoffs[0], full), expected)


def test_a_hundred_repeats_of_vectors_of_a_list_have_the_same_bits(dtype, gpu):
    """The caller's own list, in any order."""
    arguments = LARGE["batch_512x27"].arguments(dtype, gpu)
    mapping, shifts, _ = find(arguments, 5.0)
    shuffled = torch.randperm(len(shifts), generator=torch.Generator().manual_seed(13)).to(gpu)
    mapping, shifts = mapping[:, shuffled], shifts[shuffled]
    leaves = leaves_of(arguments)

    def gradients():
        vectors = diffnl.pair_vectors(*leaves, mapping, shifts, arguments[3])
        return torch.autograd.grad(vectors.pow(3).sum(), leaves)

    expected = gradients()
    for _ in range(100):
        poison(gpu)
        assert_same(gradients(), expected)


def test_repeats_of_forces_and_stress_have_the_same_bits(dtype, gpu):
    arguments = LARGE["batch_512x27"].arguments(dtype, gpu)
    _, _, pbc, system_idx = arguments

    def forces_and_stress():
        positions, cell = leaves = leaves_of(arguments)
        energy = find((*leaves, pbc, system_idx), 5.0).distances.sin().sum()
        return diffnl.forces_and_stress(energy, positions, cell, system_idx)

    expected = forces_and_stress()
    for _ in range(20):
        poison(gpu)
        assert_same(forces_and_stress(), expected)
