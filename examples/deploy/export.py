"""Writes a potential that holds the layer as a package that runs without Python, and frames to run it on.

    python examples/deploy/export.py --out build/deploy

Energy, forces and stress are traced together (make_fx), so that the package needs no autograd; the number of
atoms stays free, and so does the number of pairs. torch.export and AOTInductor do the rest.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import diffnl

ELEMENTS = ("O", "Si")
SEED = 7


class Potential(nn.Module):
    """Atoms in the density of their neighbours, energies in eV and lengths in Å: not fitted to anything."""

    def __init__(self, cutoff: float = 5.0):
        super().__init__()
        self.cutoff = cutoff
        self.neighbors = diffnl.NeighborList(cutoff)
        generator = torch.Generator().manual_seed(SEED)
        shape = (len(ELEMENTS), len(ELEMENTS))
        self.strength = nn.Parameter(torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5)
        self.decay = nn.Parameter(torch.rand(shape, generator=generator, dtype=torch.float64) + 1.0)

    def forward(self, positions: Tensor, cell: Tensor, pbc: Tensor, species: Tensor) -> Tensor:
        """(N, 3), (3, 3), (3,) bool, (N,) int64 -> the energy, ()."""
        pairs = self.neighbors(positions, cell, pbc)
        i, j = pairs.mapping
        of_pair = species[i], species[j]
        envelope = (1.0 - (pairs.distances / self.cutoff).square()).pow(3)
        weights = (
            envelope * self.strength[of_pair] * torch.exp(-self.decay[of_pair] * (pairs.distances - 2.0))
        )
        density = torch.zeros_like(positions[:, 0]).index_add(0, i, weights)
        return 0.5 * weights.square().sum() - density.sqrt().sum()


def evaluate(potential: Potential, positions: Tensor, cell: Tensor, pbc: Tensor, species: Tensor):
    """energy (), forces (N, 3), stress (3, 3)."""
    positions, cell = positions.detach().requires_grad_(), cell.detach().requires_grad_()
    energy = potential(positions, cell, pbc, species)
    return energy.detach(), *diffnl.forces_and_stress(energy, positions, cell)


def make_frames() -> dict[str, tuple[Tensor, ...]]:
    """(positions, cell, pbc, species) by name: a crystal in a skewed cell, and a slab with an open axis."""
    generator = torch.Generator().manual_seed(SEED)

    def frame(repeat: int, shear: float, flags: tuple) -> tuple[Tensor, ...]:
        basis = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.25, 0.25]], dtype=torch.float64)
        cells = torch.cartesian_prod(*[torch.arange(repeat, dtype=torch.float64)] * 3)
        cell = (
            4.1 * repeat * (torch.eye(3, dtype=torch.float64) + shear * torch.ones(3, 3, dtype=torch.float64))
        )
        positions = ((cells[:, None] + basis) / repeat).reshape(-1, 3) @ cell
        positions = positions + 0.1 * torch.randn(positions.shape, generator=generator, dtype=torch.float64)
        species = torch.randint(len(ELEMENTS), (len(positions),), generator=generator)
        return positions, cell, torch.tensor(flags), species

    return {"skewed": frame(3, 0.08, (True, True, True)), "slab": frame(2, -0.05, (True, True, False))}


def write_extxyz(path: Path, positions: Tensor, cell: Tensor, pbc: Tensor, species: Tensor) -> None:
    lattice = " ".join(f"{x:.17g}" for x in cell.flatten().tolist())
    flags = " ".join("T" if flag else "F" for flag in pbc.tolist())
    lines = [
        str(len(positions)),
        f'Lattice="{lattice}" Properties=species:S:1:pos:R:3 pbc="{flags}"',
        *(
            f"{ELEMENTS[element]} {x:.17g} {y:.17g} {z:.17g}"
            for element, (x, y, z) in zip(species.tolist(), positions.tolist(), strict=True)
        ),
    ]
    path.write_text("\n".join(lines) + "\n")


def trace(potential: Potential, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Energy, forces and stress as one graph; the numbers of atoms and pairs are symbols."""

    def run(*inputs):
        return evaluate(potential, *inputs)

    traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    atoms = torch.export.Dim("atoms", min=2)
    return torch.export.export(traced, inputs, dynamic_shapes=({0: atoms}, None, None, {0: atoms}))


def export(potential: Potential, package: Path) -> None:
    program = trace(potential, make_frames()["slab"])
    metadata = {"elements": " ".join(ELEMENTS)}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(package), inductor_configs={"aot_inductor.metadata": metadata}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/deploy"))
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name, frame in make_frames().items():
        write_extxyz(out / f"{name}.extxyz", *frame)
    export(Potential(), out / "potential.pt2")
    print(f"wrote {out / 'potential.pt2'}")


if __name__ == "__main__":
    main()
