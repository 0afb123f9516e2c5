"""Writes a potential that examples/train_mlip.py trained as a package that runs without Python.

    python examples/deploy/export.py --potential runs/mlip/potential.pt --out build/deploy

Energy, forces and stress are traced together (make_fx), so that the package needs no autograd; the number of
atoms stays free, and so does the number of pairs. torch.export and AOTInductor do the rest.
"""

import argparse
import sys
from pathlib import Path

import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlip.calculator import load_potential  # noqa: E402
from mlip.graphs import derivatives  # noqa: E402
from mlip.model import Potential  # noqa: E402

ATOMS = 64  # of the example that is traced; the package takes any number. 3 would pass for the 3 of (N, 3).


def evaluate(potential: Potential, positions: Tensor, cell: Tensor, pbc: Tensor, species: Tensor):
    """energy () in eV, forces (N, 3) in eV/Å, stress (3, 3) in eV/Å³ of one system.

    `positions` (N, 3) and `cell` (3, 3) in Å; `pbc` (3,) bool; `species` (N,) int64, places in
    `potential.config.species`.
    """
    numbers = torch.tensor(potential.config.species, device=species.device)[species]
    where = numbers, positions, cell[None], pbc[None], torch.zeros_like(species)
    energy, forces, stress = derivatives(potential, *where, create_graph=False)
    return energy[0].detach(), forces, stress[0]


def trace(potential: Potential) -> torch.export.ExportedProgram:
    """`evaluate` of a float64 potential as one graph; the numbers of atoms and pairs are symbols."""

    def run(*inputs):
        return evaluate(potential, *inputs)

    def no_single_pair(_layer, _inputs, pairs):
        # torch treats arrays of one row differently, and has to know. A full list holds (j, i, -S) for every
        # (i, j, S), or nothing.
        torch._check(pairs.shifts.shape[0] != 1)

    # Only shapes and dtypes matter.
    inputs = (
        torch.zeros(ATOMS, 3, dtype=torch.float64, device="cpu"),
        torch.zeros(3, 3, dtype=torch.float64, device="cpu"),
        torch.zeros(3, dtype=torch.bool, device="cpu"),
        torch.zeros(ATOMS, dtype=torch.int64, device="cpu"),
    )
    with potential.neighbors.register_forward_hook(no_single_pair):
        traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    atoms = torch.export.Dim("atoms", min=2)
    return torch.export.export(traced, inputs, dynamic_shapes=({0: atoms}, None, None, {0: atoms}))


def export(potential: Potential, package: Path) -> None:
    elements = " ".join(chemical_symbols[number] for number in potential.config.species)
    configs = {
        "aot_inductor.metadata": {"elements": elements},
        # Compiled loops run in one thread, matrix products in several: sums into atoms have a fixed order so,
        # and torch 2.13 cannot compile shared ones into an array of one energy.
        "cpp.threads": 1,
    }
    torch._inductor.aoti_compile_and_package(
        trace(potential), package_path=str(package), inductor_configs=configs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--potential", type=Path, default=Path("runs/mlip/potential.pt"))
    parser.add_argument("--out", type=Path, default=Path("build/deploy"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    export(load_potential(options.potential, "cpu", torch.float64), out / "potential.pt2")
    print(f"wrote {out / 'potential.pt2'}")


if __name__ == "__main__":
    main()
