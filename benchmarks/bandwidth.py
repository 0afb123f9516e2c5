"""What a GPU's memory allows, and how near diffnl comes to it.

    floors          the time that the bytes of a step take at the speed of a copy measured in the same run,
                    and the time of the step with a list that costs nothing (`free_list`)
    time_a_pair     10⁷ atoms: the time a pair next to that at 10⁶, peak memory, and that the list is right
    repeats_itself  whether the same input gives the same bits again

A pair is 40 bytes in float32, 52 in float64: 16 of mapping, 12 of shifts, and its vector. `vectors` writes
them. Any backward reads as many, with the gradient of the vector in its place. What goes to and from the
atoms comes on top, but there are ninety times fewer of them.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from floor import bare_train_step, leaf
from harness import CUTOFF, MEGABYTE, System, gpu_peak_mb, is_gpu, make_system, seconds, time_in_turns
from peers import STEPS, Run, vectors_step
from torch.autograd import Function

INDEX_BYTES = 2 * 8 + 3 * 4
FLOOR_STEPS = ("vectors", "backward", "train")
FREE_BUDGET = 0.15  # seconds a step
LARGE_SIZES = ("1000000", "10077696")  # the second is the first cube of 10⁷ atoms or more


def median_ms(call, device: str, repeats: int = 7, warmups: int = 2) -> float:
    for _ in range(warmups):
        call()
    return 1e3 * statistics.median(seconds(call, device) for _ in range(repeats))


def copy_bandwidth(device: str, size: int = 2**32) -> float:
    """Bytes a second that a copy of `size` bytes within the device's memory moves, read and written."""
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda: target.copy_(source), device, repeats=11)
    return 2 * size / (milliseconds / 1e3)


class Constants(NamedTuple):
    """What the free list hands out."""

    vectors: torch.Tensor  # (P, 3), the gradient of a gradient too
    grad_positions: torch.Tensor  # (N, 3)
    grad_cell: torch.Tensor  # of the shape of the cell


class FreeVectors(Function):
    """positions, cell -> vectors.

    A constant leaves as a new tensor of the same memory wherever autograd ties a graph to it: a stored one
    would carry the graph of the call before. Mapping and shifts do not come along, as autograd would fill
    gradients of theirs with zeros.
    """

    @staticmethod
    def forward(ctx, positions, cell, constants):
        ctx.constants = constants
        return constants.vectors.detach()

    @staticmethod
    def backward(ctx, grad):
        constants = ctx.constants
        if not torch.is_grad_enabled():
            return constants.grad_positions, constants.grad_cell, None
        return *super(Function, FreeAdjoint).apply(grad, constants), None


class FreeAdjoint(Function):
    """grad of the vectors -> grads of positions and cell; its backward is a constant without a graph."""

    @staticmethod
    def forward(ctx, grad, constants):
        ctx.constants = constants
        return constants.grad_positions.detach(), constants.grad_cell.detach()

    @staticmethod
    def backward(ctx, grad_positions, grad_cell):
        return ctx.constants.vectors, None


def free_list(system: System, num_pairs: int) -> Run:
    """A neighbour list that costs nothing, for one system, with as many pairs P as that really has.

    It leaves out all that a list does: it reads neither positions nor cell, searches nothing, makes no
    memory, writes no vectors and sums no gradients. Its tensors are there before the clock starts.

    It includes what no list can leave out that goes through a Python `autograd.Function` and returns tensors
    of exactly P rows: the Function's forward; its backward, and within that a second Function where the
    backward is to be differentiated; on a GPU one kernel that writes one number, and one wait of the host
    for the stream that is current now, because P must be known to the host before tensors of P rows can be.
    The calls go past `Function.apply`, whose checks for `torch.func` a list could do without. Vectors have
    their memory, which the energy reads; mapping and shifts, which no step reads, are one number expanded to
    their shapes.
    """
    device = system.positions.device
    ones = system.positions.new_ones
    constants = Constants(ones(num_pairs, 3), ones(system.positions.shape), ones(system.cell.shape))
    mapping = torch.zeros((), dtype=torch.int64, device=device).expand(2, num_pairs)
    shifts = torch.zeros((), dtype=torch.int32, device=device).expand(num_pairs, 3)
    count = torch.zeros((), dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device) if is_gpu(device) else None

    def run(positions, cell, system, with_vectors):
        if stream is not None:
            count.fill_(num_pairs)
            stream.synchronize()
        return mapping, shifts, super(Function, FreeVectors).apply(positions, cell, constants)

    return run


def free_ms(system: System, num_pairs: int, device: str, budget: float = FREE_BUDGET) -> dict[str, float]:
    """`STEP_free_ms` of each step: the median with the free list, timed as the rows of the benchmark are."""
    run = free_list(system, num_pairs)
    prepare = {step: lambda step=step: STEPS[step](run, system) for step in FLOOR_STEPS}
    times, errors = time_in_turns(prepare, device, budget)
    if errors:
        raise RuntimeError(f"the free list failed: {errors}")
    return {f"{step}_free_ms": 1e3 * statistics.median(times[step]) for step in FLOOR_STEPS}


def floors(row: dict, dtype: torch.dtype, bandwidth: float, device: str) -> dict:
    """Floors of diffnl's `row` of the benchmark, and its times over them.

    The train step's floor is measured: its energy, gradient and double backward on vectors that are there
    already (`floor.py`), which is torch's own work whatever the list. So is each step of the free list.
    """
    pairs = row["pairs"]
    bare = bare_train_step(leaf(pairs, dtype, device))
    bytes_a_pair = INDEX_BYTES + 3 * dtype.itemsize
    floor_ms = {step: 1e3 * pairs * bytes_a_pair / bandwidth for step in ("vectors", "backward")}
    floor_ms["train"] = median_ms(bare, device)
    found = {"system": row["system"], "pairs": pairs, "bytes_a_pair": bytes_a_pair}
    for step, floor in floor_ms.items():
        time = row[f"{step}_ms"]
        found |= {f"{step}_floor_ms": floor, f"{step}_ratio": None if time is None else time / floor}
    found["train_floor_mb"] = gpu_peak_mb(bare, device)["peak"]
    del bare  # its vectors' memory, before the free list makes its own
    size = row["system"].partition("-")[2]
    return found | free_ms(make_system(size, dtype, device), pairs, device)


def is_right(pairs, system: System, count: int = 2**20) -> bool:
    """Whether a sample of the list, its ends included, is what the contract says.

    Counts cannot tell a list that went wrong beyond 2³¹ elements. Vectors are computed anew, one rounded
    operation at a time, and must have the same bits; rows must ascend.
    """
    mapping, shifts, vectors = pairs
    num_pairs = mapping.shape[1]
    generator = torch.Generator(mapping.device).manual_seed(1)
    rows = torch.randint(num_pairs, (count,), generator=generator, device=mapping.device)
    rows[0], rows[1] = 0, num_pairs - 1
    i, j = mapping[:, rows]
    s, h = shifts[rows].to(vectors.dtype).unsqueeze(-1), system.cell
    expected = (system.positions[j] - system.positions[i]) + (
        (s[:, 0] * h[0] + s[:, 1] * h[1]) + s[:, 2] * h[2]
    )
    x, y, z = expected.unbind(1)
    return (
        torch.equal(expected, vectors.detach()[rows])
        and bool(((x * x + y * y) + z * z < CUTOFF**2).all())
        and bool((mapping[0, 1:] >= mapping[0, :-1]).all())
    )


def time_a_pair(run: Run, device: str, seed: int, sizes: tuple[str, ...] = LARGE_SIZES) -> list[dict]:
    """A row a size, float32: time of `vectors`, the same a pair and over the first size's, peak memory."""
    rows: list[dict] = []
    for size in sizes:
        system = make_system(size, torch.float32, device, seed)
        call = vectors_step(run, system)
        found = call()
        num_pairs, right = found[0].shape[1], is_right(found, system)
        found = None
        milliseconds = median_ms(call, device)
        rows.append(
            {
                "atoms": system.atoms,
                "pairs": num_pairs,
                "vectors_ms": milliseconds,
                "ns_per_pair": 1e6 * milliseconds / num_pairs,
                "peak_mb": gpu_peak_mb(call, device)["peak"],
                "right": right,
            }
        )
        rows[-1]["ratio"] = rows[-1]["ns_per_pair"] / rows[0]["ns_per_pair"]
        torch.cuda.empty_cache()
    return rows


def repeats_itself(run: Run, system: System) -> dict:
    """Whether two searches, and two backward passes, give the same bits."""
    positions, cell = system.leaves()
    outputs = [run(positions, cell, system, True) for _ in range(2)]
    vectors = outputs[0][2]
    weights = torch.randn_like(vectors)
    gradients = [
        torch.autograd.grad(vectors, (positions, cell), weights, retain_graph=True) for _ in range(2)
    ]

    def same(first, second) -> bool:
        return all(
            torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))
            for a, b in zip(first, second, strict=True)
        )

    return {
        "system": system.label,
        "dtype": str(vectors.dtype).removeprefix("torch."),
        "search": same(*outputs),
        "backward": same(*gradients),
    }


def print_floors(found: list[dict], bandwidth: float) -> None:
    print(f"\nFloors at the {bandwidth / 1e12:.2f} TB/s of a copy (bytes read and written)")
    for floor in found:
        parts = []
        for step in FLOOR_STEPS:
            ratio = floor[f"{step}_ratio"]
            times = "-" if ratio is None else f"{ratio:.1f}x"
            parts.append(f"{step} {floor[f'{step}_floor_ms']:.3g} ms (diffnl {times})")
        print(f"  {floor['system']}: {', '.join(parts)}; bare train peak {floor['train_floor_mb']:,.0f} MB")
        if "vectors_free_ms" in floor:  # not in a record from before there was a free list
            free = ", ".join(f"{step} {floor[f'{step}_free_ms']:.3g} ms" for step in FLOOR_STEPS)
            print(f"    a list that costs nothing: {free}")


def print_large(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"  {row['atoms']:,} atoms, {row['pairs']:,} pairs: vectors {row['vectors_ms']:.4g} ms, "
            f"{row['ns_per_pair']:.4f} ns a pair ({row['ratio']:.2f}x), peak "
            f"{row['peak_mb'] * MEGABYTE / 1e9:.1f} GB, sample {'right' if row['right'] else 'WRONG'}"
        )
