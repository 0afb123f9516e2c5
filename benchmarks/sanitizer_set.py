"""A small set of calls that together reach every kernel, each checked: for compute-sanitizer, or alone.

    python benchmarks/sanitizer_set.py --device cuda
    compute-sanitizer --tool racecheck python benchmarks/sanitizer_set.py --device cuda

Lists (full and half, sorted and not, both dtypes) are compared to `diffnl.reference`, to the bit; gradients
and second derivatives of these lists, and of shuffled parts of them in the user's form, to sums in float64.
Inputs are made and results compared on the CPU, so that hardly any kernel but diffnl's runs on the device.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass

import torch

import diffnl


@dataclass(frozen=True)
class Case:
    """One input: positions (N, 3), cell (3, 3), (B, 3, 3) or None, flags, cutoff, the atoms' systems."""

    name: str
    positions: torch.Tensor
    cell: torch.Tensor | None
    pbc: list | None
    cutoff: float
    system_idx: torch.Tensor | None = None

    def on(self, device: str, dtype: torch.dtype) -> tuple:
        """(positions, cell, pbc, system_idx)"""
        cell = None if self.cell is None else self.cell.to(device, dtype, copy=True)
        pbc = None if self.pbc is None else torch.tensor(self.pbc).to(device)
        index = None if self.system_idx is None else self.system_idx.to(device)
        return self.positions.to(device, dtype, copy=True), cell, pbc, index


def cases() -> list[Case]:
    """Each takes another way through the search or the adjoint; the comment says which."""
    generator = torch.Generator().manual_seed(0)

    def scatter(n, cell, low=0.0, high=1.0):
        fractional = low + (high - low) * torch.rand(n, 3, generator=generator, dtype=torch.float64)
        return fractional @ cell

    def cubic(a):
        return a * torch.eye(3, dtype=torch.float64)

    def rows(*values):
        return torch.tensor(values, dtype=torch.float64)

    always, skewed = [True] * 3, rows([5.0, 0, 0], [2.1, 4.4, 0], [-9.0, 1.5, 6.0])
    slab = rows([9.0, 0, 0], [1.0, 8.0, 0], [0, 0, 0])
    thick = slab + rows([0, 0, 0], [0, 0, 0], [0, 0, 6.0])
    mixed = torch.stack([cubic(5.0), skewed, cubic(30.0), cubic(7.0)])
    mixed_idx = torch.tensor([0, 1, 3])[torch.randint(3, (60,), generator=generator)]
    mixed_positions = torch.stack([scatter(1, mixed[b], -1.0, 2.0)[0] for b in mixed_idx])
    pairs_of_atoms = torch.stack([cubic(3.0 + 0.02 * k) for k in range(120)])
    crowd = torch.cat([scatter(40, cubic(6.0)), scatter(60, cubic(1e4))])
    return [
        # more atoms and bins than one block scans, no cell
        Case("clusters", scatter(2160, cubic(14.0)), None, None, 3.5, torch.arange(2160) % 12),
        # bins of the whole cell, runs cut at its faces, atoms outside it
        Case("box", scatter(120, cubic(18.0), -0.7, 1.7), cubic(18.0), always, 3.6),
        # a cell thinner than the cutoff, many images
        Case("skewed", scatter(16, skewed, -2.0, 3.0), skewed, always, 6.0),
        # an open axis whose lattice vector is zero
        Case("slab", scatter(90, thick), slab, [True, True, False], 5.0),
        # shifts that fit no packed link
        Case("chain", scatter(2, cubic(0.6)), cubic(0.6), [False, False, True], 25.0),
        # a row too long to sort in place
        Case("tiny", rows([0.3, 0.1, 0.9]), cubic(0.9), always, 6.5),
        # more bins than slots
        Case("sparse", crowd, None, None, 3.0),
        # interleaved systems of different cells, one of them empty
        Case("mixed", mixed_positions, mixed, always, 5.0, mixed_idx),
        # a batch of many small systems
        Case("batch", torch.cat([scatter(2, h) for h in pairs_of_atoms]), pairs_of_atoms, always, 4.0,
             torch.arange(120).repeat_interleave(2)),
        Case("lonely", rows([1.0, 2.0, 3.0]), cubic(9.0), always, 4.0),
        Case("nothing", torch.zeros(0, 3, dtype=torch.float64), cubic(9.0), always, 4.0),
    ]  # fmt: skip


def columns(mapping: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """(P, 5): i, j and S of each pair, on the CPU."""
    return torch.cat([mapping.t(), shifts.to(torch.int64)], 1).cpu()


def in_order(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (P, 5) and vectors (P, 3) on the CPU, in the order of a sorted list."""
    keys, vectors = columns(pairs.mapping, pairs.shifts), pairs.vectors.detach().cpu()
    order = torch.arange(len(keys))
    for column in reversed(range(5)):  # stable sorts, least significant key first
        order = order[torch.argsort(keys[order, column], stable=True)]
    return keys[order], vectors[order]


def half_of(keys: torch.Tensor) -> torch.Tensor:
    """Which pairs of a full list a half list holds: i < j, or i = j and S lexicographically positive."""
    i, j, s0, s1, s2 = keys.unbind(1)
    positive = (s0 > 0) | ((s0 == 0) & ((s1 > 0) | ((s1 == 0) & (s2 > 0))))
    return (i < j) | ((i == j) & positive)


def linear_map(inputs: dict, keys: torch.Tensor, system_idx) -> torch.Tensor:
    """(r_j - r_i) + S @ h in float64 on the CPU, without the term that `inputs` lacks: (P, 3)."""
    i, j, shifts = keys[:, 0], keys[:, 1], keys[:, 2:].double()
    vectors = torch.zeros(len(keys), 3, dtype=torch.float64)
    if "positions" in inputs:
        vectors = vectors + (inputs["positions"][j] - inputs["positions"][i])
    if "cell" in inputs:
        systems = torch.zeros_like(i) if system_idx is None else system_idx[i]
        cells = inputs["cell"].reshape(-1, 3, 3)[systems]
        vectors = vectors + torch.einsum("pk,pkc->pc", shifts, cells)
    return vectors


def assert_near(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding in the dtype of `found`; sums of some hundred terms lose a few digits."""
    error = (found.detach().cpu().double() - expected).abs().max().item() if expected.numel() else 0.0
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    limit = 1e3 * torch.finfo(found.dtype).eps * size
    assert error <= limit, f"{name}: off by {error:.2e}, allowed {limit:.2e}"
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"


def check_derivatives(name: str, vectors, inputs: dict, keys: torch.Tensor, system_idx) -> None:
    """First and second derivatives of `vectors` to `inputs`: "positions", "cell" or both.

    The vectors are linear in the inputs and the gradients are linear in the upstream gradient g, so the
    derivative of the gradients to g is the map itself.
    """
    generator = torch.Generator().manual_seed(1)

    def random_like(tensor):
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return values.to(tensor.dtype).to(tensor.device)

    g = random_like(vectors).requires_grad_()
    gradients = torch.autograd.grad(vectors, list(inputs.values()), g, create_graph=True)
    leaves = {key: tensor.detach().cpu().double().requires_grad_() for key, tensor in inputs.items()}
    map_of_leaves = linear_map(leaves, keys, system_idx)
    expected = torch.autograd.grad(map_of_leaves, list(leaves.values()), g.detach().cpu().double())
    for key, found, right in zip(inputs, gradients, expected, strict=True):
        assert_near(f"{name}: gradient of {key}", found, right)

    upstream = [random_like(tensor) for tensor in gradients]
    (second,) = torch.autograd.grad(gradients, g, upstream)
    tangents = {key: tensor.cpu().double() for key, tensor in zip(inputs, upstream, strict=True)}
    assert_near(f"{name}: second derivative", second, linear_map(tangents, keys, system_idx))


def check_padded(label: str, case: Case, device: str, dtype, fresh, full: bool, ordered: bool) -> int:
    """The list in room for more pairs and for fewer, and its derivatives; the number of lists looked at."""
    positions, cell, pbc, index = case.on(device, dtype)
    if cell is None and index is not None:
        cell, pbc = torch.zeros(int(index.max()) + 1, 3, 3, dtype=dtype, device=device), False
    num_pairs = fresh.shifts.shape[0]
    if num_pairs > 0 and full and fresh.shifts.abs().max() > 31:
        positions.requires_grad_(False)  # what a GPU cannot link, it does not differentiate
    else:
        positions.requires_grad_()
    for capacity in (num_pairs + 300, num_pairs - 1) if num_pairs > 0 else (300,):
        layer = diffnl.NeighborList(case.cutoff, full=full, sorted=ordered, capacity=capacity)
        padded = layer(positions, cell, pbc, index)
        assert int(padded.num_pairs) == num_pairs, f"{label}: another number of pairs in room for {capacity}"
        fits = capacity >= num_pairs
        if fits:
            parts = padded.mapping[:, :num_pairs], padded.shifts[:num_pairs], padded.vectors[:num_pairs]
            assert all(map(torch.equal, parts, fresh)), f"{label}: other pairs in room for {capacity}"
        if positions.requires_grad:
            g = torch.ones_like(padded.vectors, requires_grad=True)
            (first,) = torch.autograd.grad(padded.vectors, positions, g, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), g)
            assert bool(first.isfinite().all()) == fits == bool(second.isfinite().all()), label
    return 2 if num_pairs > 0 else 1


def check_skin(label: str, case: Case, device: str, dtype, fresh, full: bool) -> int:
    """The sorted list from candidates: searched, reused, searched again; the number of lists looked at."""
    positions, cell, pbc, index = case.on(device, dtype)
    if cell is None and index is not None:
        cell, pbc = torch.zeros(int(index.max()) + 1, 3, 3, dtype=dtype, device=device), False
    num_pairs = fresh.shifts.shape[0]
    linked = num_pairs == 0 or fresh.shifts.abs().max() <= 31  # what a GPU can keep for a padded list
    for capacity in (None, 3 * num_pairs + 300) if linked else (None,):
        layer = diffnl.NeighborList(case.cutoff, full=full, skin=0.05 * case.cutoff, capacity=capacity)
        for moved in (positions, positions, positions + 3 * case.cutoff * torch.eye(3).to(positions)[:1]):
            found = layer(moved.requires_grad_(len(positions) > 0), cell, pbc, index)
            if num_pairs > 0:
                torch.autograd.grad(found.vectors.square().sum(), moved)
            if moved is positions:
                parts = found.mapping[:, :num_pairs], found.shifts[:num_pairs], found.vectors[:num_pairs]
                assert all(map(torch.equal, parts, fresh)), f"{label}: other pairs with a skin"
        if cell is not None:
            layer(positions, cell, pbc, index)
            check_jumps(label, layer, positions.detach(), cell, pbc, index)
    return 7 if linked else 4


def check_jumps(label: str, layer: diffnl.NeighborList, positions, cell, pbc, index) -> None:
    """Every other atom moves by two lattice vectors where they are periodic: candidates that have jumped."""
    cells = cell.reshape(-1, 3, 3)
    first = cells[:, 0] * torch.as_tensor(pbc, device=cell.device).expand(cells.shape[:2])[:, :1]
    of_atom = first[torch.zeros(len(positions), dtype=torch.int64) if index is None else index]
    jumped = positions + 2.0 * (torch.arange(len(positions), device=cell.device) % 2)[:, None] * of_atom
    found = layer(jumped, cell, pbc, index)
    fresh = diffnl.neighbor_pairs(jumped, cell, pbc, layer.cutoff, index, full=layer.full, sorted=True)
    count = len(fresh.shifts)
    parts = found.mapping[:, :count], found.shifts[:count], found.vectors[:count]
    assert all(map(torch.equal, parts, fresh)), f"{label}: other pairs after jumps"


def check(case: Case, dtype: torch.dtype, device: str) -> int:
    """All lists of one case and their derivatives; the number of lists looked at."""
    name = f"{case.name}, {dtype}"
    positions, cell, pbc, index = case.on("cpu", dtype)
    keys, vectors = in_order(diffnl.reference.neighbor_pairs(positions, cell, pbc, case.cutoff, index))
    assert len(keys) > 0 or case.name in ("lonely", "nothing"), f"{name}: no pairs to look at"
    generator = torch.Generator().manual_seed(2)
    count = 0
    for full, ordered in itertools.product((True, False), (True, False)):
        label = f"{name}, {'full' if full else 'half'}, {'sorted' if ordered else 'unsorted'}"
        positions, cell, pbc, on_device = case.on(device, dtype)
        inputs = {"positions": positions.requires_grad_()}
        if cell is not None:
            inputs["cell"] = cell.requires_grad_()
        layer = diffnl.NeighborList(case.cutoff, full=full, sorted=ordered)
        pairs = layer(positions, cell, pbc, on_device)
        wanted = slice(None) if full else half_of(keys)
        found_keys, found_vectors = in_order(pairs)
        assert torch.equal(found_keys, keys[wanted]), f"{label}: other pairs than the reference"
        assert torch.equal(found_vectors, vectors[wanted]), f"{label}: other vectors than the reference"
        own_keys = columns(pairs.mapping, pairs.shifts)
        assert torch.equal(own_keys[:, 0], own_keys[:, 0].sort().values), f"{label}: rows do not ascend"
        if ordered:
            assert torch.equal(own_keys, found_keys), f"{label}: rows are not sorted"
        check_derivatives(label, pairs.vectors, inputs, own_keys, index)
        for key in inputs if len(inputs) > 1 and not ordered else ():
            check_derivatives(f"{label}, {key} alone", pairs.vectors, {key: inputs[key]}, own_keys, index)

        # Part of the list in an order of its own, as a user might bring it: nothing is known about it.
        some = torch.randperm(len(own_keys), generator=generator)[: 2 * len(own_keys) // 3 + 1]
        mapping, shifts = own_keys[some, :2].t().to(device), own_keys[some, 2:].int().to(device)
        again = diffnl.pair_vectors(positions, cell, mapping, shifts, on_device)
        same = pairs.vectors.detach().cpu()[some]
        assert torch.equal(again.detach().cpu(), same), f"{label}: pair_vectors gives other bits"
        check_derivatives(f"{label}, given", again, inputs, own_keys[some], index)
        count += 2 + check_padded(label, case, device, dtype, pairs, full, ordered)
        if ordered:
            count += check_skin(label, case, device, dtype, pairs, full)
    return count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", help="names of cases, separated by commas (default: all)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    wanted = [case for case in cases() if not options.cases or case.name in options.cases.split(",")]
    count = 0
    for case in wanted:
        for dtype in (torch.float32, torch.float64):
            count += check(case, dtype, options.device)
    print(
        f"{count} lists of {len(wanted)} cases right on {options.device}, {time.perf_counter() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    main()
