"""A small potential of the training example, with random weights, and what it is tried on."""

import sys
from pathlib import Path

import ase
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mlip.calculator import build_potential  # noqa: E402
from mlip.data import collate, frame_from_atoms  # noqa: E402
from mlip.model import ModelConfig  # noqa: E402

CPU = torch.device("cpu")


def random_potential(dtype=torch.float64, **changes):
    torch.manual_seed(3)
    values = {
        "species": (28, 29),
        "cutoff": 4.0,
        "channels": 4,
        "reference_energies": (-1.0, 2.0),
        "num_neighbors": 20.0,
    }
    return build_potential(ModelConfig(**{**values, **changes}), CPU, dtype).requires_grad_(False)


def alloy():
    """Five atoms of two elements in a skewed cell smaller than the cutoff."""
    random = np.random.default_rng(5)
    cell = np.array([[3.5, 0.2, -0.3], [0.4, 3.2, 0.5], [-0.9, 0.3, 4.0]])
    return ase.Atoms("NiCu2NiCu", scaled_positions=random.random((5, 3)), cell=cell, pbc=True)


def labelled(atoms, **labels):
    values = {"energy": -1.0, "forces": np.zeros((len(atoms), 3)), "stress": np.zeros(6), **labels}
    atoms.calc = SinglePointCalculator(
        atoms, **{key: value for key, value in values.items() if value is not None}
    )
    return atoms


def batch_of(*structures, dtype=torch.float64):
    return collate([frame_from_atoms(labelled(atoms.copy()), "test") for atoms in structures], CPU, dtype)
