"""How long `check_potential` takes for a network of CHGNet's size.

    python benchmarks/check_potential.py
    python benchmarks/check_potential.py --repeat 2

The network is invariant, like CHGNet, with as many parameters (412,525 in version 0.3) and a few more, its
four rounds of messages between atoms within 6 Å and its 64 features; it has random weights, float64, and sees
rock salt: the 8 atoms of a conventional cell, or more. Prints the report.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn

import diffnl
from diffnl.testing import check_potential

CUTOFF = 6.0  # Å
EDGE = 5.64  # Å, of sodium chloride
FEATURES, RADIAL, ROUNDS, WIDTH = 64, 31, 4, 164


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(size, following), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Network(nn.Module):
    """Atoms that gather gated messages of their neighbours under a smooth envelope."""

    def __init__(self) -> None:
        super().__init__()
        self.neighbors = diffnl.NeighborList(CUTOFF)
        self.embed = nn.Embedding(100, FEATURES)
        self.bond = nn.Linear(RADIAL, FEATURES, bias=False)
        self.core, self.gate = (
            nn.ModuleList(mlp(3 * FEATURES, WIDTH, FEATURES) for _ in range(ROUNDS)) for _ in range(2)
        )
        self.update = nn.ModuleList(mlp(FEATURES, FEATURES, FEATURES) for _ in range(ROUNDS))
        self.readout = mlp(FEATURES, WIDTH, WIDTH, 1)

    def forward(self, positions: Tensor, cell: Tensor, pbc: Tensor, numbers: Tensor) -> Tensor:
        pairs = self.neighbors(positions, cell, pbc)
        i, j = pairs.mapping
        x = pairs.distances[:, None] / CUTOFF
        envelope = (1.0 - x.square()).pow(3)
        waves = torch.sin(torch.pi * torch.arange(1, RADIAL + 1, device=x.device) * x) / x
        bond, atom = self.bond(waves * envelope), self.embed(numbers)
        for core, gate, update in zip(self.core, self.gate, self.update, strict=True):
            both = torch.cat([atom[i], atom[j], bond], 1)
            messages = core(both) * torch.sigmoid(gate(both)) * envelope
            atom = atom + update(torch.zeros_like(atom).index_add(0, i, messages))
        return self.readout(atom).sum()


def rock_salt(repeat: int) -> tuple[Tensor, Tensor, Tensor]:
    """Atomic numbers (N,), positions (N, 3) and cell (3, 3) of `repeat` conventional cells along x."""
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    numbers = torch.where(corners.sum(1) % 2 == 0, 11, 17)
    moves = torch.zeros(repeat, 1, 3, dtype=torch.float64)
    moves[:, 0, 0] = 2.0 * torch.arange(repeat)
    cell = EDGE * torch.diag(torch.tensor([float(repeat), 1.0, 1.0], dtype=torch.float64))
    return numbers.repeat(repeat), (corners + moves).reshape(-1, 3) * EDGE / 2, cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="cells along x, of 8 atoms each")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = Network().double()
    numbers, positions, cell = rock_salt(options.repeat)
    start = time.perf_counter()
    report = check_potential(network, positions, cell, True, [numbers], cutoff=CUTOFF)
    elapsed = time.perf_counter() - start
    size = sum(parameter.numel() for parameter in network.parameters())
    print(report)
    print(f"\n{size:,} parameters, {len(numbers)} atoms, {torch.get_num_threads()} threads: {elapsed:.1f} s")
    if not report:
        sys.exit(f"failed: {', '.join(report.failed)}")


if __name__ == "__main__":
    main()
