"""Runs the C++ program on frames and compares it with the same potential as an ASE calculator in float64.

    python examples/deploy/check.py --potential runs/mlip/potential.pt --out build/deploy \\
        --train runs/mlip/copper_train.extxyz

`--train` is a file the potential was trained on: the frames are one of it, and two made of that.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlip.calculator import PotentialCalculator  # noqa: E402
from mlip.data import atoms_from_frame, read_frames  # noqa: E402

TOLERANCE = 1e-12  # relative to the largest component


def make_frames(train: Path) -> dict[str, ase.Atoms]:
    """A frame of the file; the same in a skewed cell, with atoms outside; the same with an open axis."""
    frames = [frame for frame in read_frames(train) if frame.has_stress]
    # In calmer frames forces may be zero, but for rounding.
    atoms = atoms_from_frame(max(frames, key=lambda frame: frame.forces.abs().max()))
    skewed = atoms.repeat((2, 1, 1))
    skewed.set_cell(skewed.cell @ (np.eye(3) + 0.08), scale_atoms=True)
    skewed.positions += np.random.default_rng(7).integers(-2, 3, (len(skewed), 3)) @ skewed.cell
    slab = atoms.copy()
    slab.pbc = True, True, False
    return {"as_given": atoms, "skewed": skewed, "slab": slab}


def run_program(out: Path, path: Path) -> subprocess.CompletedProcess:
    command = [out / "cmake" / "evaluate", out / "potential.pt2", path]
    return subprocess.run(command, capture_output=True, text=True)


def compare(calculator: PotentialCalculator, out: Path, name: str, atoms: ase.Atoms) -> float:
    """The largest of the relative errors of energy, forces and stress, each of which is printed."""
    path = out / f"{name}.extxyz"
    ase.io.write(path, atoms, columns=["symbols", "positions"], write_info=False, write_results=False)
    atoms = ase.io.read(path)  # with as many decimals as the program reads
    atoms.calc = calculator
    done = run_program(out, path)
    if done.returncode:
        sys.exit(done.stderr)
    printed = np.array(done.stdout.split(), dtype=float)
    expected = {
        "energy": np.array([atoms.get_potential_energy()]),
        "stress": atoms.get_stress(voigt=False).ravel(),
        "forces": atoms.get_forces().ravel(),
    }
    worst = 0.0
    for ours, (what, theirs) in zip(np.split(printed, [1, 10]), expected.items(), strict=True):
        assert ours.shape == theirs.shape and abs(theirs).max() > 1e-3, (name, what)
        error = float(abs(ours - theirs).max() / abs(theirs).max())
        worst = max(worst, error)
        print(f"{name:8} {len(atoms):4} atoms  {what} off by {error:.1e}")
    return worst


def check_refusal(calculator: PotentialCalculator, out: Path) -> None:
    """An element that the potential was not trained on is an error that names it."""
    unknown = "He" if 2 not in calculator.model.config.species else "Ne"
    ase.io.write(out / "unknown.extxyz", ase.Atoms(unknown, cell=[9.0] * 3, pbc=True))
    done = run_program(out, out / "unknown.extxyz")
    assert done.returncode == 1 and f"does not know {unknown}" in done.stderr, done
    print(done.stderr.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--potential", type=Path, default=Path("runs/mlip/potential.pt"))
    parser.add_argument("--train", type=Path, default=Path("runs/mlip/copper_train.extxyz"))
    parser.add_argument("--out", type=Path, default=Path("build/deploy"))
    options = parser.parse_args()
    out = options.out.resolve()
    calculator = PotentialCalculator(options.potential, "cpu", torch.float64)
    frames = make_frames(options.train)
    worst = max(compare(calculator, out, name, atoms) for name, atoms in frames.items())
    if not worst <= TOLERANCE:
        sys.exit(f"the C++ program and Python differ by {worst:.1e}, more than {TOLERANCE}")
    check_refusal(calculator, out)


if __name__ == "__main__":
    main()
