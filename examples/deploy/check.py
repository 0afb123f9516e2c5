"""Runs the C++ program on each frame and compares it with the same potential in Python.

python examples/deploy/check.py --out build/deploy
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from export import Potential, evaluate, make_frames

TOLERANCE = 1e-12  # relative to the largest component


def run_program(out: Path, name: str) -> tuple[torch.Tensor, ...]:
    """energy (), forces (N, 3), stress (3, 3) as the program prints them."""
    command = [out / "cmake" / "evaluate", out / "potential.pt2", out / f"{name}.extxyz"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    numbers = torch.tensor([float(word) for word in printed], dtype=torch.float64)
    return numbers[0], numbers[10:].reshape(-1, 3), numbers[1:10].reshape(3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/deploy"))
    out = parser.parse_args().out.resolve()
    potential, worst = Potential(), 0.0
    for name, frame in make_frames().items():
        expected = evaluate(potential, *frame)
        for what, ours, theirs in zip(
            ("energy", "forces", "stress"), run_program(out, name), expected, strict=True
        ):
            assert ours.shape == theirs.shape and theirs.abs().max() > 1e-3, (name, what)
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            worst = max(worst, error)
            print(f"{name:8} {len(frame[0]):4} atoms  {what:7} differ by {error:.1e}")
    if not worst <= TOLERANCE:
        sys.exit(f"the C++ program and Python differ by {worst:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
