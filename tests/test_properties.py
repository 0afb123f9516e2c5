"""Properties of a trained potential by derivative against finite differences.

The potential is that of `copper.py`; what is compared holds for any smooth energy.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("phonopy")
pytest.importorskip("ase")
import ase.build  # noqa: E402
import ase.io  # noqa: E402
from ase.calculators.emt import EMT  # noqa: E402
from ase.units import GPa, _amu  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mlip.model  # noqa: E402
import mlip.properties  # noqa: E402
from mlip.calculator import PotentialCalculator  # noqa: E402
from mlip.data import frame_from_atoms, make_copper  # noqa: E402
from mlip.properties import (  # noqa: E402
    band_path,
    cubic_constants,
    elastic_by_differences,
    elastic_constants,
    elastic_from_frames,
    energies_over_volumes,
    fit_curve,
    force_constants,
    phonon_bands,
    relax,
    strain_hessian,
)
from mlip.sums import PairSums  # noqa: E402

pytest_plugins = ["copper"]


def crooked():
    """Four atoms out of equilibrium in a skewed cell that is smaller than the cutoff."""
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.set_cell(
        atoms.cell.array @ [[1.02, 0.03, 0.0], [0.0, 0.98, 0.01], [0.02, 0.0, 1.0]], scale_atoms=True
    )
    atoms.rattle(0.1, seed=2)
    return atoms


# Relaxation.


def test_relaxation_forgets_where_it_began(fcc, calculator):
    cube = ase.build.bulk("Cu", cubic=True)
    cube.set_cell(
        cube.cell.array @ [[1.03, 0.01, 0.0], [0.01, 0.98, 0.0], [0.0, 0.0, 1.01]], scale_atoms=True
    )
    cube.rattle(0.05, seed=3)
    relaxed = relax(cube, calculator)
    assert np.abs(relaxed.get_stress()).max() < 1e-4 * GPa
    assert np.abs(relaxed.get_forces()).max() < 1e-6
    assert relaxed.get_volume() / 4 == pytest.approx(fcc.get_volume(), rel=1e-6)
    assert relaxed.get_potential_energy() / 4 == pytest.approx(fcc.get_potential_energy(), abs=1e-9)
    assert not np.allclose(cube.positions, relaxed.positions, atol=1e-3)  # the argument is left alone


def test_relaxation_that_does_not_end_is_an_error(calculator):
    with pytest.raises(RuntimeError, match="not relaxed after 2 steps of FIRE"):
        relax(crooked(), calculator, steps=2)


# Second derivatives.


@pytest.mark.parametrize("crystal", ["fcc", "hcp"])
def test_elastic_constants_are_differences_of_stress(crystal, calculator, request):
    atoms = request.getfixturevalue(crystal)
    derivative = elastic_constants(atoms, calculator.model)
    differences = elastic_by_differences(atoms, calculator)
    scale = np.abs(derivative.held).max()
    assert scale > 100
    np.testing.assert_allclose(derivative.held, differences.held, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(derivative.relaxed, differences.relaxed, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(derivative.relaxed, derivative.relaxed.T, rtol=0, atol=1e-9 * scale)
    assert (
        np.linalg.eigvalsh(derivative.relaxed)[0] > 10
    )  # a stable crystal, so the comparison means something
    softening = np.abs(derivative.held - derivative.relaxed).max()
    assert softening > 0.01 * scale if crystal == "hcp" else softening < 1e-6 * scale


def test_elastic_constants_do_not_depend_on_the_cell(fcc, calculator):
    primitive = elastic_constants(fcc, calculator.model)
    skewed = ase.build.make_supercell(fcc, [[1, 1, 0], [0, 1, 0], [0, 1, 2]])
    np.testing.assert_allclose(
        elastic_constants(skewed, calculator.model).relaxed, primitive.relaxed, atol=1e-6
    )
    c11, c12, c44 = cubic_constants(primitive.relaxed)
    expected = np.zeros((6, 6))
    expected[:3, :3] = c12
    np.fill_diagonal(expected, [c11] * 3 + [c44] * 3)
    np.testing.assert_allclose(primitive.relaxed, expected, atol=1e-4)


def test_hessian_of_strain_and_atoms_out_of_equilibrium(calculator):
    """Its block of the atoms is that of `force_constants`, the mixed one a difference of forces by strain."""
    atoms, step = crooked(), 1e-4
    hessian = strain_hessian(atoms, calculator.model)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-8)
    constants = force_constants(atoms, calculator.model)
    np.testing.assert_allclose(hessian[6:, 6:], constants.transpose(0, 2, 1, 3).reshape(12, 12), atol=1e-9)
    forces = []
    for sign in (1, -1):
        moved = atoms.copy()
        shear = np.eye(3) + sign * step / 2 * np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0]])
        moved.set_cell(atoms.cell.array @ shear, scale_atoms=True)
        moved.calc = calculator
        forces.append(moved.get_forces())
    expected = (forces[1] - forces[0]).reshape(-1) / (2 * step)
    np.testing.assert_allclose(hessian[3, 6:], expected, atol=1e-4 * np.abs(expected).max())


def test_force_constants_are_differences_of_forces(calculator):
    atoms, step, rows = crooked(), 1e-4, [3, 1]
    constants = force_constants(atoms, calculator.model, rows)
    assert constants.shape == (2, 4, 3, 3)
    expected = np.empty_like(constants)
    for k, atom in enumerate(rows):
        for axis in range(3):
            forces = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[atom, axis] += sign * step
                moved.calc = calculator
                forces.append(moved.get_forces())
            expected[k, :, axis] = (forces[1] - forces[0]) / (2 * step)
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(constants, expected, atol=1e-5)


def test_force_constants_are_symmetric_and_cost_nothing_to_translate(calculator):
    constants = force_constants(crooked(), calculator.model)
    np.testing.assert_allclose(constants, constants.transpose(1, 0, 3, 2), atol=1e-9)
    np.testing.assert_allclose(constants.sum(1), 0, atol=1e-9)


def test_the_sums_of_a_gpu_have_the_same_hessian(calculator, monkeypatch):
    expected = strain_hessian(crooked(), calculator.model)
    monkeypatch.setattr(mlip.model, "PairSums", partial(PairSums, segments=True))
    np.testing.assert_allclose(strain_hessian(crooked(), calculator.model), expected, atol=1e-8)


def test_hessian_on_a_gpu(path, calculator, gpu):
    on_gpu = PotentialCalculator(path, gpu, torch.float64)
    atoms = crooked()
    expected = strain_hessian(atoms, calculator.model)
    np.testing.assert_allclose(strain_hessian(atoms, on_gpu.model), expected, atol=1e-7)
    np.testing.assert_allclose(
        force_constants(atoms, on_gpu.model), force_constants(atoms, calculator.model), atol=1e-7
    )


# Phonons and the equation of state.


@pytest.mark.parametrize("crystal, supercell, modes", [("fcc", 3, 3), ("hcp", 2, 6)])
def test_bands_are_those_of_phonopy(crystal, supercell, modes, calculator, request):
    atoms = request.getfixturevalue(crystal)
    bands = phonon_bands(atoms, calculator.model, calculator, supercell, points=11)
    assert bands.largest < 0.02 and bands.apart < 1e-3
    for derivative, differences, x in zip(bands.derivative, bands.differences, bands.distances, strict=True):
        assert derivative.shape == differences.shape == (len(x), modes) == (11, modes)
        assert np.abs(derivative - differences).max() <= bands.largest
    assert max(curve.max() for curve in bands.derivative) > 4
    assert min(curve.min() for curve in bands.derivative) > -1e-3


def test_bands_start_as_sound(fcc, calculator):
    """f = d sqrt(C / density) for small q = 2 pi d along (100): longitudinal C11, transverse C44 twice."""
    bands = phonon_bands(fcc, calculator.model, calculator, supercell=5, points=41)
    assert bands.segments[0] == ("G", "X")
    c11, _, c44 = cubic_constants(elastic_constants(fcc, calculator.model).relaxed) * 1e9
    density = fcc.get_masses().sum() * _amu / (fcc.get_volume() * 1e-30)
    velocities = 1e-2 * np.sqrt(np.array([c44, c44, c11]) / density)  # Å THz
    found = bands.derivative[0][2] / bands.distances[0][2]
    np.testing.assert_allclose(found, velocities, rtol=0.02)


def test_path_of_other_lattices():
    segments, lines = band_path(ase.build.bulk("Mo").cell, 5)
    assert segments[0] == ("G", "H") and lines[0].shape == (5, 3)
    np.testing.assert_allclose(lines[0][-1], [0.5, -0.5, 0.5])
    segments, lines = band_path(ase.build.bulk("Cu").cell, 5)
    assert [a + b for a, b in segments] == ["GX", "XU", "KG", "GL"]
    k_point = lines[2][0] @ ase.build.bulk("Cu", a=1.0).cell.reciprocal()
    np.testing.assert_allclose(np.sort(np.abs(k_point)), [0, 0.75, 0.75], atol=1e-12)


@pytest.mark.parametrize("crystal", ["fcc", "hcp"])
def test_curvature_of_the_equation_of_state_is_the_bulk_modulus(crystal, calculator, request):
    atoms = request.getfixturevalue(crystal)
    shaken = atoms.copy()
    shaken.rattle(0.03, seed=4)  # at every volume the atoms find back
    curve = fit_curve(*energies_over_volumes(shaken, calculator, span=0.02))
    compliance = np.linalg.inv(elastic_constants(atoms, calculator.model).relaxed)
    assert curve.volume == pytest.approx(atoms.get_volume() / len(atoms), rel=1e-3)
    # hcp keeps its shape here, which costs what letting it go would gain.
    assert curve.bulk == pytest.approx(1 / compliance[:3, :3].sum(), rel=0.01)
    assert len(curve.volumes) == 13 and curve.energies.argmin() == 6
    assert curve.energies[6] == pytest.approx(atoms.get_potential_energy() / len(atoms), abs=1e-8)


def test_energies_without_a_minimum_are_an_error_that_names_the_volumes():
    volumes = np.linspace(9.0, 11.0, 13)
    for energies in (-volumes, volumes, np.full(13, np.nan)):
        with pytest.raises(RuntimeError, match=r"no minimum between 9.00 and 11.00 Å³/atom"):
            fit_curve(volumes, energies)


def test_the_volume_where_atoms_do_not_relax_is_named(hcp, calculator, monkeypatch):
    def stuck(atoms, fmax):
        raise RuntimeError("forces above 1e-06 eV/Å after 500 steps of BFGS")

    monkeypatch.setattr(mlip.properties, "relax_atoms", stuck)
    with pytest.raises(RuntimeError, match="at 0.94 times the volume of the crystal: forces above"):
        energies_over_volumes(hcp, calculator)


# Elastic constants from labelled structures.


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 5, 3, 4]])
def test_elastic_constants_of_labelled_structures(order):
    """Strained copper among other copper frames, labels by EMT, in any order of the shears."""
    cube = relax(ase.build.bulk("Cu", cubic=True), EMT())
    frames = make_copper(8, seed=3)
    for amount in (-0.08, -0.04, -0.02, 0.02, 0.04, 0.08):
        for row, column in ((0, 0), (2, 2), (0, 1), (1, 2)):
            gradient = np.eye(3)
            gradient[row, column] += amount
            atoms = cube.copy()
            atoms.set_cell(cube.cell.array @ gradient, scale_atoms=True)
            atoms.calc = EMT()
            atoms.get_forces()
            atoms.calc.results["stress"] = atoms.get_stress()[order]
            frames.append(frame_from_atoms(atoms, "strained"))
    found = elastic_from_frames(frames)
    expected = cubic_constants(elastic_by_differences(cube, EMT()).held)
    for name, value in zip(("C11", "C12", "C44"), expected, strict=True):
        assert found[name][0] == pytest.approx(value, rel=0.02), name
        assert found[name][1] < 0.05 * value
    assert elastic_from_frames(frames[:8]) == {}
