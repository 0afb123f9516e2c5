"""Forces, stresses and their derivatives as CUDA or HIP graphs, without launches from Python.

A step of a small model is thousands of short kernels, and Python launches them more slowly than they run. A
graph is launched once for all of them, and asks for shapes that never change: batches are padded to the room
that the largest one takes, and the neighbour list with a `capacity` neither waits for the device nor changes
its shape.

Padding is a system behind the batch's own, in open boundaries, of atoms too far apart to be pairs; its energy
and forces are dropped. The list's own padding is as long as the cutoff, where the model's envelope is zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diffnl

from .data import Batch, Frame
from .model import Potential


class Predictor(nn.Module):
    """Energies (B,) eV, forces (N, 3) eV/Å and stresses (B, 3, 3) eV/Å³, with a graph for a loss on them.

    One module, so that DistributedDataParallel and a captured graph see all that depends on the parameters.
    """

    def __init__(self, potential: Potential):
        super().__init__()
        self.potential = potential

    def forward(self, numbers, positions, cell, pbc, system_idx, *known):
        return derivatives(self.potential, numbers, positions, cell, pbc, system_idx, known or None)


def derivatives(
    model: Potential, numbers, positions, cell, pbc, system_idx, known=None, create_graph: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, forces and stresses, as `Predictor` gives them; arguments as of `Potential.forward`."""
    positions = positions.detach().requires_grad_()
    cell = cell.detach().requires_grad_()
    # In the model's own precision, whatever is around: e3nn's products take no mixture of dtypes.
    with torch.autocast(positions.device.type, enabled=False):
        energy = model(numbers, positions, cell, pbc, system_idx, known)
        forces_and_stress = diffnl.forces_and_stress(
            energy, positions, cell, system_idx, create_graph=create_graph
        )
    return energy, *forces_and_stress


@dataclass(frozen=True)
class Room:
    """What the largest batch takes, and a system and an atom more for the padding: the shapes of a graph."""

    systems: int
    atoms: int
    pairs: int
    cutoff: float

    @classmethod
    def for_batches(cls, frames: list[Frame], size: int, cutoff: float) -> Room:
        """Room for any `size` of the frames together."""
        atoms, pairs = [], []
        for frame in frames:
            where = frame.positions.double(), frame.cell.double(), frame.pbc
            # A little further, for pairs that another dtype finds just inside the cutoff.
            pairs.append(diffnl.neighbor_pairs(*where, cutoff * (1 + 1e-5)).mapping.shape[1])
            atoms.append(len(frame.numbers))
        most = [sum(sorted(counts)[-size:]) for counts in (atoms, pairs)]
        return cls(size + 1, most[0] + 1, max(most[1], 1), cutoff)

    def pad(self, batch: Batch) -> tuple[Tensor, ...]:
        """The arguments of `Predictor`, of this room's shapes."""
        atoms, systems = len(batch.numbers), len(batch.cell)
        new = batch.positions.new_zeros
        # The last system's cell: one shift of it makes a known pair as long as the cutoff.
        cell = new(self.systems, 3, 3) + self.cutoff * torch.eye(
            3, dtype=batch.cell.dtype, device=batch.cell.device
        )
        cell[:systems] = batch.cell
        pbc = batch.pbc.new_zeros(self.systems, 3)
        pbc[:systems] = batch.pbc
        numbers = batch.numbers[:1].repeat(self.atoms)
        numbers[:atoms] = batch.numbers
        positions = new(self.atoms, 3)
        positions[atoms:, 0] = 2 * self.cutoff * torch.arange(self.atoms - atoms, device=new(0).device)
        positions[:atoms] = batch.positions
        system_idx = torch.full_like(numbers, self.systems - 1)
        system_idx[:atoms] = batch.system_idx
        padded = numbers, positions, cell, pbc, system_idx
        if batch.mapping is None:
            return padded
        pairs = batch.mapping.shape[1]
        mapping = batch.mapping.new_full((2, self.pairs), self.atoms - 1)
        mapping[:, :pairs] = batch.mapping
        shifts = batch.shifts.new_zeros(self.pairs, 3)
        shifts[pairs:, 0] = 1
        shifts[:pairs] = batch.shifts
        return *padded, mapping, shifts, torch.tensor(pairs, device=mapping.device)


def cut(outputs: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, ...]:
    """`Predictor`'s outputs for the batch itself, without those of its padding."""
    energy, forces, stress = outputs
    return energy[: len(batch.cell)], forces[: len(batch.numbers)], stress[: len(batch.cell)]


def capture(predictor: Predictor, room: Room, batch: Batch) -> Predictor:
    """The predictor as a forward and a backward graph, for batches padded to `room`; `batch` is one of them.

    Only for training: the graphs replay the derivatives with respect to the parameters, and no others.
    """
    predictor.potential.neighbors = diffnl.NeighborList(room.cutoff, capacity=room.pairs)
    # The gradients' own nodes stay on the stream of the capture; torch waits for it, and warns.
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # As many as DistributedDataParallel asks for before it.
    return torch.cuda.make_graphed_callables(predictor, room.pad(batch), num_warmup_iters=11)


class CapturedSystem:
    """Energy, forces and stress of one system as a graph, for all positions and cells of the same atoms.

    `numbers` (N,) int64 and `pbc` (3,) bool stay what they are. Where a density grows beyond the list's
    capacity the graph is captured again.
    """

    def __init__(self, model: Potential, numbers: Tensor, pbc: Tensor):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.numbers, self.pbc = numbers, pbc
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, positions: Tensor, cell: Tensor) -> Tensor:
        """(N, 3) and (3, 3) in the model's dtype -> energy, forces and stress in a row, float64."""
        if self.graph is not None:
            self.positions.copy_(positions)
            self.cell.copy_(cell[None])
            self.graph.replay()
            found = self.found.cpu()
            if torch.isfinite(found[: 1 + self.positions.numel()]).all():  # a molecule's stress is NaN
                return found
        self._capture(positions, cell)
        self.graph.replay()
        return self.found.cpu()

    def _capture(self, positions: Tensor, cell: Tensor) -> None:
        """Raises what the list raises of bad input."""
        device = self.numbers.device
        self.positions, self.cell = positions.to(device), cell[None].to(device)
        where = self.positions, self.cell[0], self.pbc
        capacity = diffnl.estimate_capacity(*where, self.model.config.cutoff)
        self.model.neighbors = diffnl.NeighborList(self.model.config.cutoff, capacity=capacity)
        # Kept, as all that the graph reads must be.
        self.system_idx = torch.zeros_like(self.numbers)

        def run() -> Tensor:
            inputs = self.numbers, self.positions, self.cell, self.pbc[None], self.system_idx
            return torch.cat(
                [part.detach().double().flatten() for part in derivatives(self.model, *inputs, None, False)]
            )

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = run()
