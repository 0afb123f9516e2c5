"""Molecular dynamics that must conserve something: energy at constant volume, an extended energy in NPT."""

from __future__ import annotations

from dataclasses import dataclass, field

import ase
import numpy as np
from ase.calculators.calculator import Calculator
from ase.md.nose_hoover_chain import MTKNPT
from ase.md.verlet import VelocityVerlet
from ase.units import GPa, fs, kB

from .progress import watch


@dataclass
class Trajectory:
    """What was recorded, M times: all lists of M.

    `time` in ps, `conserved` in eV/atom, `temperature` in K, `volume` in Å³/atom; in NPT `pressure` in GPa.
    """

    time: list[float] = field(default_factory=list)
    conserved: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    volume: list[float] = field(default_factory=list)
    pressure: list[float] = field(default_factory=list)

    @property
    def drift(self) -> float:
        """Change of the conserved energy along its linear fit, first to last record, in meV/atom."""
        return float(1000 * np.polyfit(self.time, self.conserved, 1)[0] * (self.time[-1] - self.time[0]))

    @property
    def excursion(self) -> float:
        """Largest distance of the conserved energy from where it started, in meV/atom."""
        return float(1000 * np.abs(np.array(self.conserved) - self.conserved[0]).max())

    def mean(self, name: str) -> float:
        """Mean over the second half, when the crystal is in equilibrium."""
        values = getattr(self, name)
        return float(np.mean(values[len(values) // 2 :]))


def with_velocities(atoms: ase.Atoms, calculator: Calculator, temperature: float, seed: int) -> ase.Atoms:
    """A copy with random velocities of exactly twice `temperature` (K), and no momentum.

    The atoms start from their lattice sites: half of the kinetic energy goes into the potential energy of
    nearly harmonic vibrations within a fraction of a picosecond.
    """
    atoms = atoms.copy()
    masses = atoms.get_masses()[:, None]
    random = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    momenta = random * np.sqrt(masses * kB)
    atoms.set_momenta(momenta - masses * momenta.sum(0) / masses.sum())
    atoms.set_momenta(atoms.get_momenta() * np.sqrt(2 * temperature / atoms.get_temperature()))
    atoms.calc = calculator
    return atoms


def record(dynamics, steps: int, every: int, conserved, with_pressure: bool) -> Trajectory:
    """Runs `steps` and takes down the state at the start and after `every` steps."""
    trajectory, atoms = Trajectory(), dynamics.atoms

    def note() -> None:
        trajectory.time.append(dynamics.get_time() / (1000 * fs))
        trajectory.conserved.append(conserved() / len(atoms))
        trajectory.temperature.append(atoms.get_temperature())
        trajectory.volume.append(atoms.get_volume() / len(atoms))
        if with_pressure:
            stress = atoms.get_stress(include_ideal_gas=True)
            trajectory.pressure.append(float(-stress[:3].mean() / GPa))

    dynamics.attach(note, interval=every)
    with watch("molecular dynamics", steps) as update:
        for _ in dynamics.irun(steps):  # the first is the state before any step
            if dynamics.nsteps > 0:
                update()
    return trajectory


def nve(
    atoms: ase.Atoms,
    calculator: Calculator,
    *,
    temperature: float,
    ps: float,
    step: float = 1.0,
    seed: int = 0,
    every: int = 5,
) -> Trajectory:
    """Velocity Verlet, a `step` in fs, for `ps` picoseconds at about `temperature` (K): conserves the energy.

    The energy of a Verlet trajectory swings with the vibrations, by a part proportional to step²; that is in
    `excursion` and does not grow.
    """
    atoms = with_velocities(atoms, calculator, temperature, seed)
    dynamics = VelocityVerlet(atoms, timestep=step * fs)
    return record(dynamics, round(1000 * ps / step), every, atoms.get_total_energy, with_pressure=False)


def npt(
    atoms: ase.Atoms,
    calculator: Calculator,
    *,
    temperature: float,
    ps: float,
    pressure: float = 0.0,
    step: float = 1.0,
    seed: int = 0,
    every: int = 5,
) -> Trajectory:
    """Constant `temperature` (K) and `pressure` (GPa), the cell free, for `ps` picoseconds, a `step` in fs.

    The equations of Martyna, Tobias and Klein, J. Chem. Phys. 101, 4177 (1994), with thermostats of 0.1 ps
    and a barostat of 1 ps. They conserve the sum of p V and the energies of atoms, thermostats and barostat.
    """
    atoms = with_velocities(atoms, calculator, temperature, seed)
    dynamics = MTKNPT(
        atoms, timestep=step * fs, temperature_K=temperature, pressure_au=pressure * GPa,
        tdamp=100 * fs, pdamp=1000 * fs,
    )  # fmt: skip
    conserved = dynamics.get_conserved_energy
    return record(dynamics, round(1000 * ps / step), every, conserved, with_pressure=True)
