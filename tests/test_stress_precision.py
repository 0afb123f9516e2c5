"""The stress in the precision of its inputs, whatever torch does to matrix products, wherever atoms are."""

import contextlib

import pytest
import torch
from compare import assert_equal_bits
from systems import TRICLINIC, cubic, scatter, tensor

import diffnl

CUTOFF = 4.0
batched = pytest.mark.parametrize("batch", [False, True], ids=["one_cell", "batch"])


def system(batch, device, dtype, offset=0.0):
    """(positions, cell, system_idx) with gradients, `offset` along each axis; the batch is interleaved."""
    cell, owner = tensor(TRICLINIC), None
    positions = scatter(24, TRICLINIC, 80, 0.0, 1.0) + offset
    if batch:
        owner = torch.arange(24, device=device) % 3
        cell = torch.stack([cell, tensor(cubic(7.0)), 0.9 * cell.flip(1)])
    return positions.to(device, dtype).requires_grad_(), cell.to(device, dtype).requires_grad_(), owner


def energy_of(positions, cell, owner):
    """() of pairs and of the volume, without a product of matrices: any precision is that of `positions`."""
    pairs = diffnl.neighbor_pairs(positions, cell, True, CUTOFF, owner)
    x = 1.0 - pairs.vectors.square().sum(-1) / CUTOFF**2
    return (x.pow(3) / (1.0 + pairs.vectors[:, 0].square())).sum() + (cell[..., 0, 1] * cell[..., 2, 0]).sum()


def everything(batch, device, dtype):
    """Strained inputs, forces and stress at them, and the gradients of a loss on all of that."""
    positions, cell, owner = system(batch, device, dtype)
    generator = torch.Generator().manual_seed(81)
    strain = 0.01 * torch.randn(cell.shape, generator=generator, dtype=torch.float64)
    strain = strain.to(device, dtype).requires_grad_()
    moved = diffnl.strained(positions, cell, strain, owner)
    energy = energy_of(*moved, owner)
    forces, stress = diffnl.forces_and_stress(energy, *moved, owner, create_graph=True)
    virial = diffnl.stress.to_virial(stress, moved[1])
    back = diffnl.stress.from_virial(virial, moved[1])
    loss = forces.square().sum() + stress.square().sum() + virial.square().sum() + (back - 1.0).square().sum()
    second = torch.autograd.grad(loss, (positions, cell, strain))
    return *moved, forces, stress, virial, back, *second


@contextlib.contextmanager
def matmul_precision(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


AMBIENT = {
    "autocast_bfloat16": lambda device: torch.autocast(device.type, torch.bfloat16),
    "autocast_float16": lambda device: torch.autocast(device.type, torch.float16),
    "tf32": lambda device: matmul_precision("high"),
    "bfloat16_products": lambda device: matmul_precision("medium"),
}


@batched
@pytest.mark.parametrize("ambient", AMBIENT)
def test_stress_and_strain_do_not_follow_the_precision_of_matrix_products(ambient, batch, dtype, device):
    """Same bits and dtypes, first and second derivatives, though a matrix product would have others."""
    plain = everything(batch, device, dtype)
    with AMBIENT[ambient](device):
        found = everything(batch, device, dtype)
        if dtype == torch.float32 and ambient.startswith("autocast"):
            assert (plain[0] @ plain[0].mT).dtype != dtype, "this context lowers nothing"
    assert all(t.dtype == dtype for t in found)
    assert_equal_bits(found, plain)


def test_tf32_lowers_matrix_products_here(gpu):
    """What the test above would miss on a card where TF32 changes nothing."""
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(82)).to(gpu)
    with matmul_precision("high"):
        low = a @ a
    with matmul_precision("highest"):
        assert not torch.equal(a @ a, low)


def test_autocast_of_a_checked_potential(device):
    """`check_potential` works in float64, which autocast leaves alone."""

    def energy(positions, cell, pbc):
        x = 1.0 - diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF).distances / CUTOFF
        return x.pow(4).sum()

    positions, cell, _ = system(False, device, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        report = diffnl.testing.check_potential(energy, positions, cell, True, cutoff=CUTOFF)
    assert report, str(report)


@batched
@pytest.mark.parametrize("offset", [0.0, 1e2, -1e3, 1e4])
def test_float32_stress_far_from_the_origin(offset, batch, device):
    """Off by less than 1e-6 of the stress that float64 finds for the same positions."""
    positions, cell, owner = system(batch, device, torch.float32, offset)
    _, stress = diffnl.forces_and_stress(energy_of(positions, cell, owner), positions, cell, owner)
    exact = positions.detach().double().requires_grad_(), cell.detach().double().requires_grad_()
    _, expected = diffnl.forces_and_stress(energy_of(*exact, owner), *exact, owner)
    assert len(diffnl.neighbor_pairs(*exact, True, CUTOFF, owner).shifts) > 100
    scale = expected.abs().amax((-2, -1), keepdim=True)
    assert ((stress.double() - expected).abs() / scale).max() < 1e-6


@batched
def test_energy_of_a_field_is_strained_about_the_center_of_each_system(batch, device):
    """sigma = (1/V) dE/d(eps) of r -> c + (r - c) (1 + eps) by finite differences, c the mean position."""
    positions, cell, owner = system(batch, device, torch.float64, 5.0)
    charges = torch.linspace(-1.0, 2.0, len(positions), dtype=torch.float64, device=device)

    def energies(r, h):
        return energy_of(r, h, owner) + (charges[:, None] * r.sin() * r).sum()

    energy = energies(positions, cell)
    assert torch.autograd.grad(energy, positions, retain_graph=True)[0].sum(0).abs().min() > 0.1
    _, stress = diffnl.forces_and_stress(energy, positions, cell, owner)
    cells, each = cell.detach().reshape(-1, 3, 3), torch.zeros_like(positions[:, 0], dtype=torch.int64)
    each = each if owner is None else owner
    step = 1e-5
    with torch.no_grad():
        centers = torch.stack([positions[each == b].mean(0) for b in range(len(cells))])[each]
        for b, h in enumerate(cells):
            for row, column in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
                eps = torch.zeros_like(cells)
                eps[b, row, column] += step / 2
                eps[b, column, row] += step / 2
                up, down = (
                    energies(
                        positions + torch.einsum("na,nab->nb", positions - centers, s * eps[each]),
                        (cells + cells @ (s * eps)).view_as(cell),
                    )
                    for s in (1, -1)
                )
                slope = (up - down) / (2 * step * torch.linalg.det(h).abs())
                torch.testing.assert_close(stress.view(-1, 3, 3)[b, row, column], slope, rtol=1e-6, atol=1e-8)
