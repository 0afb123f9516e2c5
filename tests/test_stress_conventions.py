"""The three ways to a stress, and the stress as other codes write it."""

import pytest
import torch
from ase import units
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from systems import SYSTEMS

import diffnl
from diffnl import stress as conventions

CUTOFF = 4.0
NAMES = ["diamond", "batch_mixed_pbc"]


def stress_of(*components):
    """(3, 3) of xx, yy, zz, yz, xz, xy."""
    xx, yy, zz, yz, xz, xy = components
    return torch.tensor([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], dtype=torch.float64)


def pair_energy(vectors):
    """Of each pair; not central, so that no route may lean on v (x) dE/dv being symmetric."""
    x = 1.0 - vectors.square().sum(-1) / CUTOFF**2
    return x.pow(3) * (1.0 + 0.2 * vectors[:, 0] / (1.0 + vectors[:, 1] ** 2))


@pytest.mark.parametrize("name", NAMES)
def test_three_routes(name, device):
    """The gradient of the cell, the gradient of a strain, and sum over pairs of v (x) dE/dv."""
    positions, cell, pbc, owner = SYSTEMS[name].arguments(torch.float64, device)
    if owner is None:
        owner = torch.zeros(len(positions), dtype=torch.int64, device=device)
    periodic = torch.linalg.det(cell.reshape(-1, 3, 3)).abs() > 0
    volume = torch.linalg.det(cell.reshape(-1, 3, 3)).abs()[:, None, None]
    positions.requires_grad_(), cell.requires_grad_()
    strain = torch.zeros_like(cell).requires_grad_()

    pairs = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF, owner)
    energy = pair_energy(pairs.vectors).sum()
    (of_pair,) = torch.autograd.grad(energy, pairs.vectors, retain_graph=True)
    outer = pairs.vectors.detach().unsqueeze(2) * of_pair.unsqueeze(1)
    zeros = torch.zeros_like(volume.expand(-1, 3, 3))
    from_pairs = zeros.index_add(0, owner[pairs.mapping[0]], outer) / volume
    from_pairs = 0.5 * (from_pairs + from_pairs.mT)

    energies = torch.zeros(len(volume), dtype=torch.float64, device=device)
    energies = energies.index_add(0, owner[pairs.mapping[0]], pair_energy(pairs.vectors))
    energies = energies if cell.ndim == 3 else energies.sum()
    _, from_cell = diffnl.forces_and_stress(energies, positions, cell, owner)

    moved = diffnl.strained(positions.detach(), cell.detach(), 0.5 * (strain + strain.mT), owner)
    of_strain = pair_energy(diffnl.neighbor_pairs(*moved, pbc, CUTOFF, owner).vectors).sum()
    (from_strain,) = torch.autograd.grad(of_strain, strain)
    from_strain = from_strain.reshape(-1, 3, 3) / volume

    from_cell = from_cell.reshape(-1, 3, 3)[periodic]
    assert len(from_cell) and from_cell.abs().max() > 1e-3, "nothing to compare"
    scale = from_cell.abs().max()
    assert (from_cell - from_pairs[periodic]).abs().max() <= 1e-12 * scale
    assert (from_cell - from_strain[periodic]).abs().max() <= 1e-12 * scale


def test_voigt_is_ases():
    stress = stress_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert conventions.to_voigt(stress).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    batch = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = batch + batch.mT
    voigt = conventions.to_voigt(batch)
    assert torch.equal(voigt[1, 2], torch.from_numpy(full_3x3_to_voigt_6_stress(batch[1, 2].numpy())))
    back = conventions.from_voigt(voigt)
    assert torch.equal(back, batch)
    assert torch.equal(back[0, 1], torch.from_numpy(voigt_6_to_full_3x3_stress(voigt[0, 1].numpy())))


def test_vasp_has_its_own_order_sign_and_unit():
    """A line "in kB" is xx, yy, zz, xy, yz, zx, and what is under tension is negative in it."""
    vasp = conventions.to_vasp(conventions.from_gpa(stress_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    expected = torch.tensor([-10.0, -20.0, -30.0, -60.0, -40.0, -50.0], dtype=torch.float64)
    torch.testing.assert_close(vasp, expected, rtol=1e-14, atol=0.0)
    # How ASE reads that line.
    by_ase = -vasp.numpy()[[0, 1, 2, 4, 5, 3]] * 0.1 * units.GPa
    ours = conventions.to_voigt(conventions.from_vasp(vasp))
    torch.testing.assert_close(ours, torch.from_numpy(by_ase), rtol=1e-7, atol=0.0)


def test_gigapascals():
    charge = 1.602176634e-19  # C, exact
    assert conventions.GPA == pytest.approx(charge * 1e30 / 1e9, rel=1e-15)
    assert conventions.GPA == pytest.approx(1 / units.GPa, rel=1e-7)
    stress = stress_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    torch.testing.assert_close(conventions.from_gpa(conventions.to_gpa(stress)), stress, rtol=1e-15, atol=0)


def test_virial_is_minus_the_derivative_of_the_strain():
    """Of a left-handed cell too: a volume is positive."""
    cell = torch.stack([2.0 * torch.eye(3), 3.0 * torch.eye(3).flip(0)]).double()
    stress = torch.stack([stress_of(*range(1, 7)), stress_of(*range(6, 0, -1))])
    virial = conventions.to_virial(stress, cell)
    torch.testing.assert_close(virial, -torch.tensor([8.0, 27.0]).double()[:, None, None] * stress)
    torch.testing.assert_close(conventions.from_virial(virial, cell), stress)

    positions = torch.rand(5, 3, dtype=torch.float64).requires_grad_()
    h = (3.0 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)

    def energy(r, h):
        return pair_energy(diffnl.neighbor_pairs(r, h, True, CUTOFF).vectors).sum()

    _, stress = diffnl.forces_and_stress(energy(positions, h), positions, h)
    (of_strain,) = torch.autograd.grad(energy(*diffnl.strained(positions, h, strain)), strain)
    torch.testing.assert_close(conventions.to_virial(stress, h), -0.5 * (of_strain + of_strain.mT))


def test_converters_are_differentiable():
    stress = stress_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0).requires_grad_()
    cell = torch.eye(3, dtype=torch.float64).requires_grad_()
    for convert in (conventions.to_vasp, conventions.to_gpa, conventions.to_voigt):
        assert torch.autograd.gradcheck(convert, (stress,))
    assert torch.autograd.gradcheck(conventions.to_virial, (stress, cell))


@pytest.mark.parametrize(
    "convert, shape, text",
    [
        (conventions.to_voigt, (6,), r"`stress` must have shape \(\.\.\., 3, 3\); got \(6,\)"),
        (conventions.from_voigt, (3, 3), r"`stress` must have shape \(\.\.\., 6\); got \(3, 3\)"),
        (conventions.to_vasp, (), r"`stress` must have shape \(\.\.\., 3, 3\); got \(\)"),
        (conventions.from_vasp, (2, 3), r"`stress` must have shape \(\.\.\., 6\); got \(2, 3\)"),
    ],
)
def test_a_wrong_shape(convert, shape, text):
    with pytest.raises(ValueError, match=text):
        convert(torch.ones(shape))


def test_a_virial_needs_the_cell_of_its_stress():
    stress, cell = torch.ones(3, 3), torch.ones(2, 3, 3)
    with pytest.raises(
        ValueError, match=r"`stress` must have the shape of `cell`, \(2, 3, 3\); got \(3, 3\)"
    ):
        conventions.to_virial(stress, cell)
    with pytest.raises(ValueError, match=r"`virial` must have the shape of `cell`"):
        conventions.from_virial(stress, cell)
    with pytest.raises(TypeError, match="`stress` must be a torch.Tensor; got list"):
        conventions.to_virial([1.0], cell)
