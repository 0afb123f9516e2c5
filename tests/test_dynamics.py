"""Molecular dynamics with a trained potential: what must be conserved."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("phonopy")
pytest.importorskip("ase")
from ase.units import GPa  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import properties as example  # noqa: E402
from mlip.dynamics import Trajectory, npt, nve, with_velocities  # noqa: E402

pytest_plugins = ["copper"]


def test_energy_is_conserved(fcc, calculator):
    """What is left swings with the square of the step, and does not grow."""
    cube = example.box(fcc, 32)
    assert len(cube) == 32
    runs = [nve(cube, calculator, temperature=300, ps=0.3, step=step, every=1) for step in (4.0, 2.0)]
    excursions = [run.excursion for run in runs]
    assert 0.001 < excursions[1] < 0.5
    assert excursions[0] / excursions[1] == pytest.approx(4, rel=0.3)
    assert abs(runs[1].drift) < 0.1 * excursions[1] + 0.02
    assert len(runs[1].time) == 151 and runs[1].time[-1] == pytest.approx(0.3)
    assert runs[1].temperature[0] == pytest.approx(600) and 200 < runs[1].mean("temperature") < 400
    again = nve(cube, calculator, temperature=300, ps=0.02, step=4.0, every=1)
    assert again.conserved == runs[0].conserved[:6]
    assert (
        nve(cube, calculator, temperature=300, ps=0.02, step=4.0, seed=1).conserved[0] != again.conserved[0]
    )


def test_velocities(fcc, calculator):
    atoms = with_velocities(example.box(fcc, 32), calculator, 300, seed=0)
    assert atoms.get_temperature() == pytest.approx(600)
    np.testing.assert_allclose(atoms.get_momenta().sum(0), 0, atol=1e-12)


def test_npt_conserves_its_energy(fcc, calculator):
    cube = example.box(fcc, 32)
    runs = [npt(cube, calculator, temperature=300, ps=0.2, step=step, every=1) for step in (4.0, 2.0)]
    excursions = [run.excursion for run in runs]
    assert 0.001 < excursions[1] < 0.5
    assert excursions[0] / excursions[1] == pytest.approx(4, rel=0.4)
    assert runs[1].mean("volume") > fcc.get_volume() * 1.001  # it expands when heated
    assert np.ptp(runs[1].volume) > 1e-3 and np.isfinite(runs[1].pressure).all()


def test_pressure_is_obeyed(fcc, calculator):
    """A pressure that is switched on makes the crystal shrink at once, and counts in what is conserved."""
    cube = example.box(fcc, 32)
    run = npt(cube, calculator, temperature=10, ps=0.2, pressure=10.0, step=2.0, every=1)
    work = 1000 * 10.0 * GPa * (run.volume[0] - run.volume[-1])
    assert work > 10 and run.excursion < 0.1 * work


def test_drift_and_excursion():
    run = Trajectory(time=[0.0, 1.0, 2.0, 3.0], conserved=[-1.0, -0.999, -0.998, -0.997])
    assert run.drift == pytest.approx(3.0) and run.excursion == pytest.approx(3.0)
    run = Trajectory(time=[0.0, 1.0, 2.0], conserved=[0.0, -0.002, 0.0], temperature=[9.0, 1.0, 3.0])
    assert run.drift == pytest.approx(0.0, abs=1e-9) and run.excursion == pytest.approx(2.0)
    assert run.mean("temperature") == 2.0
