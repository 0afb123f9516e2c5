"""The trained potential as an ASE calculator, and a relaxation that uses it."""

from __future__ import annotations

import warnings
from pathlib import Path

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from ase.stress import full_3x3_to_voigt_6_stress
from ase.units import GPa

from .data import stress_is_defined
from .graphs import CapturedSystem, derivatives
from .model import ModelConfig, Potential, load_weights, weights
from .training import write_atomically


def save_potential(model: Potential, path: Path) -> None:
    """Write the weights and all that is needed to build the model again."""
    write_atomically({"config": model.config.to_dict(), "weights": weights(model)}, path)


def build_potential(config: ModelConfig, device, dtype: torch.dtype) -> Potential:
    """A `Potential` with coupling constants accurate in `dtype`: e3nn makes them in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Potential(config).to(device)
    finally:
        torch.set_default_dtype(before)


def load_potential(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Potential:
    """The model that `save_potential` wrote, in `dtype` on `device`."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = build_potential(ModelConfig.from_dict(saved["config"]), device, dtype)
    load_weights(model, saved["weights"])
    return model.requires_grad_(False)


def inputs_of(model: Potential, atoms: ase.Atoms) -> tuple[torch.Tensor, ...]:
    """Numbers (N,), positions (N, 3), cell (1, 3, 3), pbc (1, 3), system_idx (N,), where the weights are."""
    like = next(model.parameters())
    numbers = torch.tensor(atoms.numbers, dtype=torch.int64, device=like.device)
    positions = torch.tensor(atoms.positions, dtype=like.dtype, device=like.device)
    cell = torch.tensor(atoms.cell.array, dtype=like.dtype, device=like.device)[None]
    pbc = torch.tensor(atoms.pbc, device=like.device)[None]
    return numbers, positions, cell, pbc, torch.zeros_like(numbers)


class PotentialCalculator(Calculator):
    """ASE calculator: energy and free_energy (eV), forces (N, 3) (eV/Å), stress (6,) (eV/Å³, Voigt order).

    Stress is absent for structures without a periodic axis or without a volume. float64 costs twice the
    time and gives forces that agree with finite differences to many digits. On a GPU the calls for one set of
    atoms are replays of a graph.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, path: str | Path, device="cpu", dtype: torch.dtype = torch.float32, **kwargs):
        super().__init__(**kwargs)
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_potential(path, self.device, dtype)
        self._captured: tuple[bytes, CapturedSystem] | None = None

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        unknown = sorted(set(atoms.numbers.tolist()) - set(self.model.config.species))
        if unknown:
            raise ValueError(
                f"the potential knows atomic numbers {self.model.config.species}, not {unknown[0]}"
            )
        numbers, positions, cell, pbc, system_idx = inputs_of(self.model, atoms)
        if self.device.type == "cuda" and len(atoms) > 0:
            key = atoms.numbers.tobytes() + atoms.pbc.tobytes()
            if self._captured is None or self._captured[0] != key:
                self._captured = key, CapturedSystem(self.model, numbers, pbc[0])
            energy, forces, stress = self._captured[1](positions, cell[0]).split([1, 3 * len(atoms), 9])
        else:
            where = positions, cell, pbc, system_idx
            energy, forces, stress = derivatives(self.model, numbers, *where, create_graph=False)
        self.results = {
            "energy": energy.item(),
            "free_energy": energy.item(),
            "forces": forces.detach().double().cpu().numpy().reshape(-1, 3),
        }
        if stress_is_defined(atoms):
            self.results["stress"] = full_3x3_to_voigt_6_stress(
                stress.detach().double().cpu().numpy().reshape(3, 3)
            )


def relax_cell(atoms: ase.Atoms, fmax: float, steps: int) -> tuple[bool, int]:
    """FIRE on positions and cell, in place: whether it converged, and after how many steps.

    `fmax` in eV/Å bounds the forces, and in eV the virial by the number of atoms.
    """
    # For open axes: the cell must not move where nothing is periodic.
    axes = [bool(atoms.pbc[a] and atoms.pbc[b]) for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))]
    optimizer = FIRE(FrechetCellFilter(atoms, mask=axes), logfile=None)
    with warnings.catch_warnings():
        # The filter takes the logarithm of the deformation; scipy warns of errors of 1e-12 in it.
        warnings.filterwarnings("ignore", "logm result may be inaccurate", RuntimeWarning)
        converged = optimizer.run(fmax=fmax, steps=steps)
    return bool(converged), optimizer.get_number_of_steps()


def relax_strained(
    atoms: ase.Atoms, calculator: PotentialCalculator, steps: int = 200
) -> list[dict[str, float]]:
    """Stretch and shear `atoms`, relax positions and cell; the state before and after, as dicts of figures.

    Keys: "energy" eV/atom, "force" the largest in eV/Å, "pressure" and "stress" (the largest component) in
    GPa, "volume" Å³/atom, "steps".
    """
    atoms = atoms.copy()
    strain = np.array([[0.03, 0.02, 0.0], [0.02, 0.03, 0.0], [0.0, 0.0, -0.01]])
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    atoms.calc = calculator

    def state(steps_done: int) -> dict[str, float]:
        stress = atoms.get_stress() / GPa
        return {
            "energy": atoms.get_potential_energy() / len(atoms),
            "force": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
            "pressure": float(-stress[:3].mean()),
            "stress": float(np.abs(stress).max()),
            "volume": atoms.get_volume() / len(atoms),
            "steps": steps_done,
        }

    before = state(0)
    _, done = relax_cell(atoms, fmax=0.005, steps=steps)
    return [before, state(done)]
