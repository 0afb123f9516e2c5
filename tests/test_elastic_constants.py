"""examples/elastic_constants.py: second derivatives through the layer against closed-form lattice sums."""

import importlib.util
import math
import pathlib
import sys

import numpy as np
import pytest
import torch

import diffnl

PATH = pathlib.Path(__file__).parent.parent / "examples" / "elastic_constants.py"


def load_example():
    spec = importlib.util.spec_from_file_location("elastic_constants", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


example = load_example()
ARGON = example.LennardJones()


@pytest.fixture(scope="module")
def fcc():
    return example.relax(example.fcc(1.54 * ARGON.sigma), ARGON)


@pytest.fixture(scope="module")
def hcp():
    return example.relax(example.hcp(1.09 * ARGON.sigma, 1.78 * ARGON.sigma), ARGON)


@pytest.mark.parametrize("cutoff", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("compare, count", [("compare_fcc", 18), ("compare_hcp", 21)])
def test_every_value_agrees_with_the_lattice_sums(compare, count, cutoff):
    rows = getattr(example, compare)(example.LennardJones(cutoff=cutoff * ARGON.sigma))
    assert len(rows) == count
    errors = {row.name: row.error for row in rows}
    assert all(error <= 1e-8 for error in errors.values()), errors


def test_hand_written_slopes_are_those_of_the_potential():
    r = np.linspace(0.95 * ARGON.sigma, ARGON.cutoff - 1e-3, 400)
    step = 1e-4
    below, here, above = (ARGON.energy(torch.from_numpy(r + k * step)).numpy() for k in (-1, 0, 1))
    first, second = ARGON.slopes(r)
    np.testing.assert_allclose(first, (above - below) / (2 * step), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(second, (above - 2 * here + below) / step**2, rtol=1e-5, atol=1e-6)


def test_potential_is_twice_smooth_at_onset_and_cutoff():
    for edge in (ARGON.onset, ARGON.cutoff):
        first, second = ARGON.slopes(np.array([edge - 1e-9, edge + 1e-9]))
        np.testing.assert_allclose(first[0], first[1], rtol=0, atol=1e-11)
        np.testing.assert_allclose(second[0], second[1], rtol=0, atol=1e-11)


def test_cauchy_relation_holds_in_fcc_at_zero_stress(fcc):
    found = example.moduli(fcc, ARGON).relaxed
    assert abs(found[1, 2] - found[3, 3]) <= 1e-8 * found[0, 0]


def test_cauchy_relation_is_off_by_half_the_stress_in_a_compressed_crystal(fcc):
    # For a second derivative by linear strain C12 - C44 = -1/(2 V) sum (phi'/r) y^2 / 2 = -stress / 2: the
    # reason why the example works at zero stress.
    squeezed = example.Crystal(0.98 * fcc.positions, 0.98 * fcc.cell)
    found = example.moduli(squeezed, ARGON).relaxed
    stress = example.largest_stress(squeezed, ARGON)  # its sign is lost: under compression it is negative
    assert stress > 0.02 * found[0, 0]
    assert abs(found[1, 2] - found[3, 3] - stress / 2) <= 1e-8 * found[0, 0]


def test_internal_relaxation_vanishes_in_fcc_and_breaks_cauchy_in_hcp(fcc, hcp):
    cubic = example.moduli(fcc, ARGON)
    assert np.abs(cubic.clamped - cubic.relaxed).max() <= 1e-12 * cubic.relaxed[0, 0]
    hexagonal = example.moduli(hcp, ARGON)
    clamped, relaxed = hexagonal.clamped, hexagonal.relaxed
    scale = relaxed[0, 0]
    for s, t in ((1, 2), (3, 3)), ((0, 1), (5, 5)):
        assert abs(clamped[s] - clamped[t]) <= 1e-8 * scale
    assert relaxed[0, 1] - relaxed[5, 5] > 0.05 * scale
    assert abs(relaxed[5, 5] - (relaxed[0, 0] - relaxed[0, 1]) / 2) <= 1e-8 * scale
    assert np.linalg.eigvalsh(clamped - relaxed)[0] >= -1e-12 * scale  # relaxing can only soften


def test_gamma_of_the_cubic_cell_holds_the_folded_zone_boundary(fcc):
    omega2 = example.moduli(fcc, ARGON).omega2
    assert np.abs(omega2[:3]).max() <= 1e-8 * omega2[-1]
    np.testing.assert_allclose(omega2[3:9], omega2[3], rtol=1e-8)
    np.testing.assert_allclose(omega2[9:12], omega2[9], rtol=1e-8)
    assert omega2[9] > 1.5 * omega2[3] > 0


def strained(crystal, x):
    """forces (N, 3) eV/Å and stress (3, 3) eV/Å^3 of the crystal after x (6 + 3N)."""
    positions, cell = (tensor.clone().requires_grad_() for tensor in example.deform(crystal, x))
    energy = example.energy(example.Crystal(positions, cell), ARGON)
    return diffnl.forces_and_stress(energy, positions, cell)


def slope(crystal, direction, step=1e-4):
    """d(forces), d(stress in Voigt order) along `direction` (6 + 3N), by central differences."""
    ends = [strained(crystal, sign * step * direction) for sign in (1, -1)]
    forces, stress = ((plus - minus) / (2 * step) for plus, minus in zip(*ends, strict=True))
    return forces.reshape(-1), torch.stack([stress[a, b] for a, b in example.VOIGT])


@pytest.mark.parametrize("name", ["fcc", "hcp"])
def test_finite_differences_of_forces_and_stress(name, request):
    crystal = request.getfixturevalue(name)
    found = example.moduli(crystal, ARGON)
    gradient, hessian = example.gradient_and_hessian(crystal, ARGON)
    assert gradient.abs().max() <= 1e-12
    response = -torch.linalg.pinv(hessian[6:, 6:], rtol=1e-9, hermitian=True) @ hessian[6:, :6]
    basis = torch.eye(len(gradient), dtype=torch.float64)
    scale = hessian.abs().max().item()
    for s in range(6):
        # At zero stress and zero force the slope of the stress is the clamped constant ...
        forces, stress = slope(crystal, basis[s])
        torch.testing.assert_close(
            stress, torch.from_numpy(found.clamped[:, s]), rtol=1e-5, atol=1e-5 * found.clamped[0, 0]
        )
        torch.testing.assert_close(-forces, hessian[6:, s], rtol=1e-5, atol=1e-5 * scale)
        # ... and, with the atoms following the strain, the relaxed one, while the forces stay zero.
        forces, stress = slope(crystal, basis[s] + torch.cat([torch.zeros(6), response[:, s]]))
        torch.testing.assert_close(
            stress, torch.from_numpy(found.relaxed[:, s]), rtol=1e-5, atol=1e-5 * found.relaxed[0, 0]
        )
        assert forces.abs().max() <= 1e-5 * scale
    for k in range(6, len(gradient)):
        forces, _ = slope(crystal, basis[k])
        torch.testing.assert_close(-forces, hessian[6:, k], rtol=1e-5, atol=1e-5 * scale)


def test_relax_finds_the_zero_stress_cell_from_a_sheared_and_rattled_start():
    start = example.fcc(1.5 * ARGON.sigma)
    noise = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(18, dtype=torch.float64, generator=noise)
    crystal = example.relax(example.deform(start, x), ARGON)
    lattice, expected = example.expected_fcc(ARGON)
    assert abs(torch.linalg.det(crystal.cell).item() / lattice[0] ** 3 - 1) <= 1e-12
    assert example.largest_stress(crystal, ARGON) <= 1e-12 * expected.relaxed[0, 0]
    np.testing.assert_allclose(example.moduli(crystal, ARGON).omega2[3:], expected.omega2[3:], rtol=1e-8)


def test_command_line_prints_the_table_and_succeeds(capsys):
    assert example.main(["--epsilon", "1", "--sigma", "1", "--cutoff", "2"]) == 0
    out = capsys.readouterr().out
    for text in ("fcc, 4-atom cubic cell", "hcp, 2-atom cell", "C44 (GPa)", "all values agree within 1e-08"):
        assert text in out
    assert "differs" not in out


@pytest.mark.parametrize("change", [1e-6, math.nan])
def test_command_line_fails_when_the_values_differ(capsys, monkeypatch, change):
    lattice, expected = example.expected_fcc(ARGON)
    wrong = expected.relaxed * np.where(np.arange(36).reshape(6, 6) == 21, 1 + change, 1)
    monkeypatch.setattr(example, "expected_fcc", lambda _: (lattice, expected._replace(relaxed=wrong)))
    assert example.main([]) == 1
    captured = capsys.readouterr()
    assert "differs" in captured.out
    assert "2 values differ by more than 1e-08" in captured.err and "C44 (GPa)" in captured.err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cutoff", "1"], "--cutoff must be at least 1.5"),
        (["--sigma", "-1"], "--sigma must be positive and finite, got -1.0"),
        (["--epsilon", "nan"], "--epsilon must be positive and finite, got nan"),
    ],
)
def test_command_line_rejects_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        example.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
