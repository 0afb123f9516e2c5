"""The training example's potential: the symmetries of the model, and its derivatives in ASE's calculator."""

import numpy as np
import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("ase")
import ase  # noqa: E402
from alloys import alloy, batch_of, labelled, random_potential  # noqa: E402
from ase.calculators.calculator import PropertyNotImplementedError  # noqa: E402
from mlip.calculator import PotentialCalculator, save_potential  # noqa: E402
from mlip.data import frame_from_atoms  # noqa: E402
from mlip.model import radial_basis  # noqa: E402
from mlip.training import predict  # noqa: E402


@pytest.mark.parametrize("inversion", [1.0, -1.0])
def test_equivariance(inversion):
    model = random_potential()
    atoms = alloy()
    rotation = inversion * np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turned = atoms.copy()
    turned.set_cell(atoms.cell @ rotation)
    turned.positions = atoms.positions @ rotation + [0.3, -9.0, 4.0]
    energy, forces, stress = predict(model, batch_of(atoms), create_graph=False)
    energy_turned, forces_turned, stress_turned = predict(model, batch_of(turned), create_graph=False)
    turn = torch.from_numpy(rotation)
    assert forces.abs().max() > 0.1 and stress.abs().max() > 1e-3
    torch.testing.assert_close(energy_turned, energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forces_turned, forces @ turn, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(stress_turned, turn.T @ stress @ turn, rtol=1e-8, atol=1e-10)


def test_batch_equals_its_systems():
    """Periodic and open systems, a lone atom, coincident atoms: together as one by one; NaN is no stress."""
    model = random_potential()
    lone = ase.Atoms("Cu")
    molecule = ase.Atoms("NiCuCu", positions=[[0, 0, 0], [2.2, 0, 0], [0.4, 2.0, 0.3]])
    coincident = ase.Atoms(
        "CuCuNi", positions=[[0, 0, 0], [0, 0, 0], [1.9, 0.2, 0.1]], cell=[9, 9, 9], pbc=True
    )
    systems = [alloy(), lone, molecule, coincident]
    together = predict(model, batch_of(*systems), create_graph=False)
    alone = [predict(model, batch_of(atoms), create_graph=False) for atoms in systems]
    for value, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(parts), rtol=1e-9, atol=1e-11, equal_nan=True)
    assert torch.isfinite(together[0]).all() and torch.isfinite(together[1]).all()
    finite = torch.isfinite(together[2]).all(2).all(1)
    assert finite.tolist() == [True, False, False, True]


def test_energy_is_smooth_at_the_cutoff():
    basis = radial_basis(torch.tensor([3.9999, 4.0], dtype=torch.float64), 4.0, 8)
    assert basis[0].abs().max() < 1e-10 and basis[1].abs().max() < 1e-14
    model = random_potential(species=(29,), reference_energies=(0.0,))
    energies = [
        predict(model, batch_of(ase.Atoms("Cu2", positions=[[0, 0, 0], [x, 0, 0]])), create_graph=False)[0]
        for x in (3.999, 4.001, 3.0)
    ]
    assert abs(energies[0] - energies[1]) < 1e-7 < 1e-4 < abs(energies[2] - energies[1])


def test_calculator_agrees_with_finite_differences(tmp_path):
    save_potential(random_potential(), tmp_path / "potential.pt")
    atoms = alloy()
    atoms.calc = PotentialCalculator(tmp_path / "potential.pt", dtype=torch.float64)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    step = 1e-5

    def energy(positions, cell):
        moved = atoms.copy()
        moved.set_cell(cell)
        moved.positions = positions
        moved.calc = atoms.calc
        return moved.get_potential_energy()

    for atom, axis in ((0, 0), (3, 1), (4, 2)):
        shift = np.zeros((5, 3))
        shift[atom, axis] = step
        slope = energy(atoms.positions + shift, atoms.cell) - energy(atoms.positions - shift, atoms.cell)
        assert forces[atom, axis] == pytest.approx(-slope / (2 * step), abs=1e-6)
    for row, column in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        strain = np.zeros((3, 3))
        strain[row, column] = step
        plus, minus = np.eye(3) + strain, np.eye(3) - strain
        slope = energy(atoms.positions @ plus, atoms.cell @ plus) - energy(
            atoms.positions @ minus, atoms.cell @ minus
        )
        assert stress[row, column] == pytest.approx(slope / (2 * step) / atoms.get_volume(), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_calculator_under_autocast(tmp_path, dtype):
    """It computes in its own dtype, whatever is around it."""
    save_potential(random_potential(), tmp_path / "potential.pt")
    results = []
    for lowered in (False, True):
        atoms = alloy()
        atoms.calc = PotentialCalculator(tmp_path / "potential.pt", dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


def test_a_slab_whose_third_vector_lies_in_its_plane_has_no_stress(tmp_path):
    """Nor a label of one, in any orientation: what a file says there is not trained on."""
    save_potential(random_potential(), tmp_path / "potential.pt")
    slab = ase.Atoms("NiCu", [[0, 0, 0], [2.2, 0.1, 0.4]], cell=[[4, 0, 0], [0, 4, 0], [4, 4, 0]])
    slab.pbc = True, True, False
    for angle in (0, 37):
        slab.rotate(angle, (1, 2, 3), rotate_cell=True)
        slab.calc = PotentialCalculator(tmp_path / "potential.pt")
        assert np.isfinite(slab.get_forces()).all()
        with pytest.raises(PropertyNotImplementedError):
            slab.get_stress()
        assert not frame_from_atoms(labelled(slab.copy(), stress=np.full(6, 1e9)), "slab").has_stress


def test_calculator_in_open_boundaries(tmp_path):
    save_potential(random_potential(), tmp_path / "potential.pt")
    molecule = ase.Atoms("NiCu", positions=[[0, 0, 0], [2.3, 0, 0]])
    molecule.calc = PotentialCalculator(tmp_path / "potential.pt")
    assert np.isfinite(molecule.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        molecule.get_stress()
    molecule.numbers[0] = 1
    with pytest.raises(ValueError, match=r"knows atomic numbers \(28, 29\), not 1"):
        molecule.get_potential_energy()
