"""forces_and_stress and strained: against finite differences, against known pressures, and for training."""

import pytest
import torch
from systems import TRICLINIC, cubic, scatter, tensor

import diffnl

batched = pytest.mark.parametrize("batch", [False, True], ids=["one_cell", "batch"])
CUTOFF = 4.0


def system(batch, device, dtype=torch.float64):
    """(positions, cell, system_idx) with gradients; the batch is interleaved and holds an empty system."""
    cell, owner = tensor(TRICLINIC), None
    positions = scatter(8 if batch else 5, TRICLINIC, 70, -1.0, 2.0)
    if batch:
        owner = torch.tensor([2, 0, 2, 0, 0, 2, 2, 0], device=device)
        cell = torch.stack([cell, tensor(cubic(4.0)), 0.9 * cell.flip(1)])  # the last is left-handed
    return positions.to(device, dtype).requires_grad_(), cell.to(device, dtype).requires_grad_(), owner


def energies(positions, cell, owner):
    """(B,) a smooth pair energy that vanishes with two derivatives at the cutoff, or () for one cell."""
    pairs = diffnl.neighbor_pairs(positions, cell, True, CUTOFF, owner)
    each = (1.0 - (pairs.distances / CUTOFF) ** 2).pow(3) / (1.0 + pairs.vectors[:, 0] ** 2)
    if owner is None:
        return each.sum()
    return torch.zeros(len(cell), dtype=cell.dtype, device=cell.device).index_add(
        0, owner[pairs.mapping[0]], each
    )


@batched
def test_forces_against_finite_differences(batch, device):
    positions, cell, owner = system(batch, device)
    forces, _ = diffnl.forces_and_stress(energies(positions, cell, owner), positions, cell, owner)
    step = 1e-5
    with torch.no_grad():
        for k in range(positions.numel()):
            moved = torch.zeros_like(positions).flatten()
            moved[k] = step
            up, down = (
                energies(positions + s * moved.view_as(positions), cell, owner).sum() for s in (1, -1)
            )
            assert abs(-(up - down) / (2 * step) - forces.flatten()[k]) < 1e-7


@batched
def test_stress_against_finite_differences_of_strain(batch, device):
    positions, cell, owner = system(batch, device)
    _, stress = diffnl.forces_and_stress(energies(positions, cell, owner), positions, cell, owner)
    assert stress.shape == cell.shape and torch.equal(stress, stress.mT)
    volume = torch.linalg.det(cell).abs().detach()
    step = 1e-5
    with torch.no_grad():
        for a in range(3):
            for b in range(3):
                strain = torch.zeros_like(cell)
                strain[..., a, b] += step / 2
                strain[..., b, a] += step / 2
                up, down = (energies(*by_hand(positions, cell, s * strain, owner), owner) for s in (1, -1))
                expected = (up - down) / (2 * step) / volume
                torch.testing.assert_close(stress[..., a, b], expected, rtol=1e-6, atol=1e-9)


def by_hand(positions, cell, strain, owner):
    """r (1 + eps), h (1 + eps), atom by atom."""
    if owner is None:
        owner = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
    each = strain.reshape(-1, 3, 3)[owner]
    return positions + torch.einsum("na,nab->nb", positions, each), cell + cell @ strain


@batched
def test_strained(batch, device, dtype):
    positions, cell, owner = system(batch, device, dtype)
    generator = torch.Generator().manual_seed(71)
    strain = 0.1 * torch.randn(cell.shape, generator=generator, dtype=dtype).to(device)
    torch.testing.assert_close(
        diffnl.strained(positions, cell, strain, owner), by_hand(positions, cell, strain, owner)
    )
    assert torch.autograd.gradcheck(
        lambda r, h, e: diffnl.strained(r, h, e, owner),
        (
            positions.detach().double().requires_grad_(),
            cell.detach().double(),
            strain.double().requires_grad_(),
        ),
        nondet_tol=1e-12,  # torch's own products and sums
    )


@batched
def test_stress_is_the_derivative_by_strain(batch, device):
    """Two ways to one number: the chain rule of forces_and_stress, and a strain in the graph."""
    positions, cell, owner = system(batch, device)
    forces, stress = diffnl.forces_and_stress(energies(positions, cell, owner), positions, cell, owner)
    strain = torch.zeros_like(cell, requires_grad=True)
    energy = energies(*diffnl.strained(positions, cell, strain, owner), owner)
    by_positions, by_strain = torch.autograd.grad(energy.sum(), (positions, strain))
    volume = torch.linalg.det(cell).abs()[..., None, None]
    torch.testing.assert_close(stress, 0.5 * (by_strain + by_strain.mT) / volume)
    torch.testing.assert_close(forces, -by_positions)


def test_forces_sum_to_zero_and_stress_ignores_where_the_atoms_are(device):
    positions, cell, _ = system(False, device)
    forces, stress = diffnl.forces_and_stress(energies(positions, cell, None), positions, cell)
    torch.testing.assert_close(forces.sum(0), torch.zeros_like(forces[0]))
    generator = torch.Generator().manual_seed(72)
    cells = torch.randint(-3, 4, positions.shape, generator=generator).to(device, cell.dtype)
    elsewhere = (positions + cells @ cell + 3.0).detach().requires_grad_()
    moved = diffnl.forces_and_stress(energies(elsewhere, cell, None), elsewhere, cell)
    torch.testing.assert_close(moved, (forces, stress))


def test_pressure_has_the_sign_of_ase(device):
    """A crystal that wants to shrink (positive energy slope in volume) is under tension: positive stress."""
    cell = (3.0 * torch.eye(3, dtype=torch.float64, device=device)).requires_grad_()
    positions = torch.zeros(1, 3, dtype=torch.float64, device=device, requires_grad=True)
    # Six neighbours at 3: E = sum |v| = 6 a, and sigma = (1/3V) dE/d(ln a) = 6 a / (3 a^3).
    energy = diffnl.neighbor_pairs(positions, cell, True, 3.5).distances.sum()
    _, stress = diffnl.forces_and_stress(energy, positions, cell)
    torch.testing.assert_close(stress, 2.0 / 9.0 * torch.eye(3, dtype=torch.float64, device=device))


@batched
def test_batch_or_scalar_energy_give_the_same(batch, device):
    positions, cell, owner = system(batch, device)
    each = diffnl.forces_and_stress(energies(positions, cell, owner), positions, cell, owner)
    total = diffnl.forces_and_stress(energies(positions, cell, owner).sum(), positions, cell, owner)
    torch.testing.assert_close(each, total, rtol=1e-13, atol=1e-13)


def test_a_batch_is_its_systems(device):
    positions, cell, owner = system(True, device)
    forces, stress = diffnl.forces_and_stress(energies(positions, cell, owner), positions, cell, owner)
    for b in range(3):
        atoms = torch.nonzero(owner == b)[:, 0]
        r, h = positions[atoms].detach().requires_grad_(), cell[b].detach().requires_grad_()
        alone = diffnl.forces_and_stress(energies(r, h, None), r, h)
        torch.testing.assert_close((forces[atoms], stress[b]), alone)


@batched
@pytest.mark.parametrize("loss", ["forces", "stress", "both"])
def test_training_on_forces_and_stress(loss, batch, device):
    """The gradient of a loss on forces and stress by a parameter, against finite differences of it."""

    def value(parameter):
        positions, cell, owner = system(batch, device)
        energy = parameter.sin() * energies(positions, cell, owner) + (parameter * positions).sum().cos()
        forces, stress = diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)
        parts = {"forces": forces, "stress": stress}
        return sum(part.pow(2).sum() for name, part in parts.items() if loss in (name, "both"))

    parameter = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    # torch's own sums into systems use atomics on a GPU.
    assert torch.autograd.gradcheck(value, parameter, nondet_tol=1e-12)


@batched
def test_second_derivatives_by_positions_and_cell(batch, device):
    """Differentiating forces and stress again agrees with doing it through the plain torch oracle."""
    results = []
    for module, where in ((diffnl, device), (diffnl.reference, "cpu")):
        positions, cell, owner = system(batch, where)
        pairs = module.neighbor_pairs(positions, cell, True, CUTOFF, owner, sorted=True)
        energy = (1.0 / (1.0 + pairs.vectors.square().sum(1))).sum()
        forces, stress = diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)
        loss = forces.square().sum() + stress.pow(3).sum()
        results.append((forces, stress, *torch.autograd.grad(loss, (positions, cell))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11, check_device=False)


@batched
def test_float32(batch, device):
    results = []
    for dtype in (torch.float32, torch.float64):
        positions, cell, owner = system(batch, device, dtype)
        results.append(diffnl.forces_and_stress(energies(positions, cell, owner), positions, cell, owner))
    assert all(t.dtype == torch.float32 for t in results[0])
    for low, high in zip(*results, strict=True):
        torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-5)


def test_graph_is_kept_only_where_asked_for(device):
    positions, cell, owner = system(True, device)
    energy = energies(positions, cell, owner)
    forces, stress = diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)
    assert forces.requires_grad and stress.requires_grad
    forces, stress = diffnl.forces_and_stress(energy, positions, cell, owner)
    assert not forces.requires_grad and not stress.requires_grad
    assert positions.grad is None and cell.grad is None


def test_under_no_grad_an_energy_with_a_graph_still_has_forces_and_stress(device):
    positions = torch.zeros(1, 3, dtype=torch.float64, device=device, requires_grad=True)
    eye = torch.eye(3, dtype=torch.float64, device=device)
    cell = (3.0 * eye).requires_grad_()
    energy = diffnl.neighbor_pairs(positions, cell, True, 4.0).distances.sum()
    with torch.no_grad():
        forces, stress = diffnl.forces_and_stress(energy, positions, cell)
    torch.testing.assert_close(forces, torch.zeros_like(positions))
    torch.testing.assert_close(stress, 6.0 / 27.0 * eye)
