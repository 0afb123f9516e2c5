"""A neighbour list that costs nothing: what torch and Python ask for a differentiable list, whoever makes it.

Its tensors are there before the clock starts. Forward and backward are the shortest `autograd.Function`s that
can be differentiated twice: each hands out constants. The forward reads one number from the device, as every
list must whose tensors have the size of its pairs. Nothing else is launched, and nobody looks at positions.

So no list behind a Python `autograd.Function` can be faster. What is left of a benchmark's step with it is
the step itself: torch's engine, its energy and loss.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from harness import System, time_in_turns
from peers import STEPS, Run
from torch.autograd import Function

FREE_STEPS = ("vectors", "backward", "train")


class Constants(NamedTuple):
    num_pairs: torch.Tensor  # ()
    mapping: torch.Tensor  # (2, P)
    shifts: torch.Tensor  # (P, 3)
    vectors: torch.Tensor  # (P, 3)
    grad_positions: torch.Tensor  # (N, 3)
    grad_cell: torch.Tensor  # of the shape of the cell


class FreeVectors(Function):
    """positions, cell -> mapping, shifts, vectors."""

    @staticmethod
    def forward(ctx, positions, cell, constants):
        ctx.constants = constants
        mapping, shifts = constants.mapping.detach(), constants.shifts.detach()
        ctx.mark_non_differentiable(mapping, shifts)
        return mapping, shifts, constants.vectors.detach()

    @staticmethod
    def backward(ctx, _mapping, _shifts, grad):
        constants = ctx.constants
        if not torch.is_grad_enabled():
            return constants.grad_positions, constants.grad_cell, None
        return *FreeAdjoint.apply(grad, constants), None


class FreeAdjoint(Function):
    """grad of the vectors -> grads of positions and cell."""

    @staticmethod
    def forward(ctx, grad, constants):
        ctx.constants = constants
        return constants.grad_positions.detach(), constants.grad_cell.detach()

    @staticmethod
    def backward(ctx, grad_positions, grad_cell):
        return ctx.constants.vectors, None


def free_list(system: System, num_pairs: int) -> Run:
    """The list that costs nothing, for one system, with as many pairs as it really has."""
    device = system.positions.device
    constants = Constants(
        torch.tensor(num_pairs, device=device),
        torch.zeros(2, num_pairs, dtype=torch.int64, device=device),
        torch.zeros(num_pairs, 3, dtype=torch.int32, device=device),
        system.positions.new_ones(num_pairs, 3),
        torch.ones_like(system.positions),
        torch.ones_like(system.cell),
    )

    def run(positions, cell, system, with_vectors):
        constants.num_pairs.item()
        return FreeVectors.apply(positions, cell, constants)

    return run


def free_ms(system: System, num_pairs: int, device: str, budget: float = 0.3) -> dict[str, float]:
    """Milliseconds of each step of the benchmark on the free list, timed as the libraries are.

    Returns `STEP_free_ms` for each step: medians; events on a GPU.
    """
    run = free_list(system, num_pairs)
    prepare = {step: lambda step=step: STEPS[step](run, system) for step in FREE_STEPS}
    times, errors = time_in_turns(prepare, device, budget)
    if errors:
        raise RuntimeError(f"the free list failed: {errors}")
    return {f"{step}_free_ms": 1e3 * statistics.median(samples) for step, samples in times.items()}
