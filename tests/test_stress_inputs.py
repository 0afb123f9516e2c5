"""What may be behind the positions and the cell of forces_and_stress: a common origin, nothing, no volume."""

import math

import pytest
import torch
from compare import assert_equal_bits
from systems import TRICLINIC, cubic, scatter, tensor
from torch.fx.experimental.proxy_tensor import make_fx

import diffnl

CUTOFF = 4.0
batched = pytest.mark.parametrize("batch", [False, True], ids=["one_cell", "batch"])
TRACES_AUTOGRAD = hasattr(torch._dynamo.config, "trace_autograd_ops")
needs_autograd_ops = pytest.mark.skipif(
    not TRACES_AUTOGRAD, reason="this torch compiles no torch.autograd.grad: see docs/compile.md"
)


def energy_of(positions, cell, owner=None, pbc=True):
    """(B,) or () of pairs, of positions and of the cell alone: no gradient is zero or symmetric by luck."""
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF, owner)
    each = (1.0 - (pairs.distances / CUTOFF) ** 2).clamp(min=0.0).pow(3) * (1.0 + pairs.vectors[:, 0].sin())
    alone = 1e-2 * positions.square().sum(1)
    if owner is None:
        return each.sum() + alone.sum() + 1e-2 * (cell[0, 1] * cell[2, 0])
    energy = each.new_zeros(len(cell)).index_add(0, owner[pairs.mapping[0]], each)
    return energy.index_add(0, owner, alone) + 1e-2 * cell[:, 0, 1] * cell[:, 2, 0]


# ------------------------------------------------------------- positions that were computed from the cell


def fractions_and_cell(batch, device):
    generator = torch.Generator().manual_seed(90)
    fractions = torch.rand(12, 3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    cell, owner = tensor(TRICLINIC), None
    if batch:
        cell, owner = torch.stack([cell, tensor(cubic(6.0))]), torch.arange(12, device=device) % 2
    return fractions, cell.to(device).requires_grad_(), owner


def to_positions(fractions, cell, owner):
    return fractions @ cell if owner is None else (fractions.unsqueeze(1) @ cell[owner]).squeeze(1)


def of_leaves(positions, cell, owner):
    """Forces and stress of the same numbers without anything behind them."""
    positions, cell = positions.detach().requires_grad_(), cell.detach().requires_grad_()
    return diffnl.forces_and_stress(energy_of(positions, cell, owner), positions, cell, owner)


@batched
@pytest.mark.parametrize("create_graph", [False, True])
def test_positions_made_from_the_cell(create_graph, batch, device):
    """The bits of positions that were not: the cell is counted once."""
    fractions, cell, owner = fractions_and_cell(batch, device)
    positions = to_positions(fractions, cell, owner)
    found = diffnl.forces_and_stress(
        energy_of(positions, cell, owner), positions, cell, owner, create_graph=create_graph
    )
    assert_equal_bits(found, of_leaves(positions, cell, owner))


@pytest.mark.parametrize("made", ["view", "chunk", "in_place", "both_from_one", "cell_from_positions"])
def test_other_ways_to_make_positions_and_cell(made, device):
    fractions, cell, _ = fractions_and_cell(False, device)
    if made == "view":
        positions = (fractions @ cell).T.contiguous().T
    elif made == "chunk":
        positions = torch.cat([fractions, fractions.sin()]) @ cell
        positions = positions.chunk(2)[1]
    elif made == "in_place":
        positions = (fractions @ cell).add_(0.1)
    elif made == "both_from_one":
        positions, cell = (torch.cat([fractions, torch.eye(3).to(fractions)]) @ cell).split([12, 3])
    else:
        positions = fractions.detach().mul(4.0).requires_grad_()
        cell = tensor(cubic(5.0)).to(device) + positions.mean() * tensor(TRICLINIC).to(device)
    found = diffnl.forces_and_stress(energy_of(positions, cell), positions, cell)
    assert_equal_bits(found, of_leaves(positions, cell, None))


@batched
def test_training_through_positions_made_from_the_cell(batch, device):
    """Gradients of a loss on forces and stress, by fractions and cell, against finite differences."""
    fractions, cell, owner = fractions_and_cell(batch, device)

    def loss(fractions, cell):
        positions = to_positions(fractions, cell, owner)
        # Without a dependence on the origin: the mean position is held fixed in derivatives of the stress.
        pairs = diffnl.neighbor_pairs(positions, cell, True, CUTOFF, owner)
        energy = (1.0 - (pairs.distances / CUTOFF) ** 2).pow(4).sum() + (
            cell[..., 0, 1] * cell[..., 2, 0]
        ).sum()
        found = diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)
        return sum((part.square() * (1.0 + part.sin())).sum() for part in found)

    assert torch.autograd.gradcheck(loss, (fractions, cell), nondet_tol=1e-12)


def test_gradients_flow_from_positions_to_the_cell_again_afterwards(device):
    """The graph is as it was: the energy's own gradient by the cell goes through the positions too."""
    fractions, cell, _ = fractions_and_cell(False, device)
    positions = fractions @ cell
    energy = energy_of(positions, cell)
    (before,) = torch.autograd.grad(energy, cell, retain_graph=True)
    diffnl.forces_and_stress(energy, positions, cell, create_graph=True)
    with pytest.raises(ValueError):
        diffnl.forces_and_stress((cell * cell).sum(), positions, cell, create_graph=True)
    (after,) = torch.autograd.grad(energy, cell)
    assert torch.equal(before, after)


@batched
def test_strained_positions_and_cell(batch, device):
    """Derivatives by what `strained` returns, whatever leaf lies behind both."""
    fractions, cell, owner = fractions_and_cell(batch, device)
    strain = (0.01 * torch.ones_like(cell)).requires_grad_()
    moved = diffnl.strained(to_positions(fractions, cell, owner), cell, strain, owner)
    found = diffnl.forces_and_stress(energy_of(*moved, owner), *moved, owner)
    assert_equal_bits(found, of_leaves(*moved, owner))


@batched
def test_make_fx_of_positions_made_from_the_cell(batch, device):
    fractions, cell, owner = fractions_and_cell(batch, device)

    def run(fractions, cell):
        cell = cell.detach().requires_grad_()
        positions = to_positions(fractions, cell, owner)
        return diffnl.forces_and_stress(energy_of(positions, cell, owner), positions, cell, owner)

    traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        fractions.detach(), cell.detach()
    )
    expected = of_leaves(to_positions(fractions, cell, owner), cell, owner)
    torch.testing.assert_close(traced(fractions.detach(), cell.detach()), expected, rtol=1e-12, atol=1e-12)


@needs_autograd_ops
@batched
@pytest.mark.parametrize("made", ["positions_from_cell", "cell_from_positions"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in what it generates
def test_compiled_positions_made_from_the_cell(made, batch):
    """Inside the compiled function; torch itself refuses inputs that something was behind before."""
    torch._dynamo.reset()
    fractions, cell, owner = fractions_and_cell(batch, "cpu")

    def derivatives(positions, cell):
        energy = energy_of(positions, cell, owner)
        return diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)

    def loss(positions, cell):
        forces, stress = derivatives(positions, cell)
        return forces.detach(), stress.detach(), forces.square().sum() + stress.square().sum()

    def positions_from_cell(fractions, cell):
        return loss(to_positions(fractions, cell, owner), cell)

    def cell_from_positions(positions, cell):
        return loss(positions, cell + 0.1 * positions.sin().mean())

    run = {"positions_from_cell": positions_from_cell, "cell_from_positions": cell_from_positions}[made]

    def of(run):
        *values, value = run(fractions, cell)
        return *values, *torch.autograd.grad(value, (fractions, cell))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = of(torch.compile(run, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, of(run), rtol=1e-11, atol=1e-11)


# ----------------------------------------------------- energies that depend on less than they are given


def lose(positions, how):
    return {
        "detached": lambda: positions.detach(),
        "cloned": lambda: positions.clone(),
        "converted": lambda: positions.double(),
        "moved": lambda: positions + 0.0,
    }[how]()


@batched
@pytest.mark.parametrize("how", ["detached", "cloned", "converted", "moved"])
def test_an_energy_of_other_positions_is_an_error(how, batch, device):
    """The energy is computed from one tensor and differentiated by another: the forces would be zeros."""
    fractions, cell, owner = fractions_and_cell(batch, device)
    if how == "converted":
        fractions, cell = (t.detach().float().requires_grad_() for t in (fractions, cell))
    positions = to_positions(fractions, cell, owner).detach().requires_grad_()
    if how == "converted":
        energy, given = (
            energy_of(lose(positions, how), cell.double(), owner),
            (lose(positions, how), cell.double()),
        )
    elif how == "detached":
        energy, given = energy_of(lose(positions, how), cell, owner), (positions, cell)
    else:
        energy, given = energy_of(positions, cell, owner), (lose(positions, how), cell)
    for arguments in (given, (given[0], None)):
        with pytest.raises(ValueError, match="`energy` must depend on `positions`"):
            diffnl.forces_and_stress(energy, *arguments, owner, create_graph=True)


def test_the_same_in_a_trace():
    positions, cell = (torch.rand(4, 3) + torch.arange(4.0)[:, None]).requires_grad_(), 5.0 * torch.eye(3)

    def run(positions, cell):
        cell = cell.detach().requires_grad_()
        return diffnl.forces_and_stress(energy_of(positions.detach(), cell), positions, cell)

    with pytest.raises(ValueError, match="`energy` must depend on `positions`"):
        make_fx(run, _allow_non_fake_inputs=True)(positions, cell)


@needs_autograd_ops
def test_the_same_compiled():
    torch._dynamo.reset()
    positions, cell = (torch.rand(4, 3) + torch.arange(4.0)[:, None]).requires_grad_(), 5.0 * torch.eye(3)

    def run(positions, cell):
        return diffnl.forces_and_stress((cell * cell).sum(), positions, cell)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="`energy` must depend on `positions`|ValueError"):
            compiled(positions, cell.requires_grad_())


def test_an_energy_without_the_cell_has_the_stress_of_the_positions(device):
    """A cluster in a box: dE/dh is zero, sigma = sym(sum_i (r_i - c) (x) dE/dr_i) / V."""
    fractions, cell, _ = fractions_and_cell(False, device)
    positions = (fractions @ cell).detach().requires_grad_()
    apart = positions[:, None] - positions[None]
    energy = (-apart.square().sum(-1)).exp().sum()
    (slope,) = torch.autograd.grad(energy, positions, retain_graph=True)
    forces, stress = diffnl.forces_and_stress(energy, positions, cell)
    gradient = torch.einsum("na,nb->ab", positions.detach() - positions.detach().mean(0), slope)
    torch.testing.assert_close(stress, 0.5 * (gradient + gradient.T) / torch.linalg.det(cell).detach().abs())
    assert torch.equal(forces, -slope) and stress.abs().max() > 1e-3


EMPTY = {
    "lone_atom": lambda: (torch.zeros(1, 3), None, False, None),
    "no_pairs_of_many": lambda: (20.0 * torch.arange(12.0).view(4, 3), None, False, None),
    "lone_atom_in_a_box": lambda: (torch.zeros(1, 3), 9.0 * torch.eye(3), True, None),
    "no_atoms": lambda: (torch.zeros(0, 3), 9.0 * torch.eye(3), True, None),
    "no_atoms_of_a_batch": lambda: (
        torch.zeros(0, 3),
        torch.eye(3).expand(2, 3, 3),
        True,
        torch.zeros(0).long(),
    ),
    "a_batch_without_pairs": lambda: (
        torch.zeros(2, 3),
        9.0 * torch.eye(3).repeat(2, 1, 1),
        True,
        torch.arange(2),
    ),
}


@pytest.mark.parametrize("options", [{}, {"capacity": 7}, {"full": False}], ids=["plain", "padded", "half"])
@pytest.mark.parametrize("name", EMPTY)
def test_no_pairs_are_no_error(name, options, dtype, device):
    """An energy of no pairs is connected to its positions all the same: zeros."""
    positions, cell, pbc, owner = (t.to(device) if isinstance(t, torch.Tensor) else t for t in EMPTY[name]())
    positions = positions.to(dtype).requires_grad_()
    cell = None if cell is None else cell.to(dtype).clone().requires_grad_()
    pairs = diffnl.NeighborList(CUTOFF, **options)(positions, cell, pbc, owner)
    energy = (CUTOFF - pairs.distances).clamp(min=0.0).sum()
    forces, stress = diffnl.forces_and_stress(energy, positions, cell, owner, create_graph=True)
    assert torch.equal(forces, torch.zeros_like(positions))
    assert (stress is None) == (cell is None)
    assert stress is None or torch.equal(stress, torch.zeros_like(cell))


# ---------------------------------------------------------------------------------- systems without a volume


class Mixed:
    """Crystal, slab, molecule and an atom alone; the last two have no volume. `only` says which are there."""

    def __init__(self, only, device, dtype=torch.float64):
        sizes, cells = (
            (9, 8, 6, 1),
            [tensor(TRICLINIC), tensor(cubic(6.0)), torch.zeros(3, 3), torch.zeros(3, 3)],
        )
        cells[1][2, 2] = 11.0
        cells[3][0, 0] = 4.0  # one row is no volume either
        all_pbc = [(True, True, True), (True, True, False), (False,) * 3, (False,) * 3]
        parts = [scatter(n, TRICLINIC, 91 + k, 0.0, 1.0) for k, n in enumerate(sizes)]
        self.positions = torch.cat([parts[k] for k in only]).to(device, dtype).requires_grad_()
        self.cell = torch.stack([cells[k] for k in only]).to(device, dtype).requires_grad_()
        self.pbc = torch.tensor([all_pbc[k] for k in only], device=device)
        owner = torch.arange(len(only)).repeat_interleave(torch.tensor([sizes[k] for k in only]))
        self.owner = owner.to(device)
        self.strength = torch.tensor(0.7, device=device, dtype=dtype, requires_grad=True)
        self.reach = torch.tensor(0.3, device=device, dtype=dtype, requires_grad=True)

    def predict(self):
        """Energies (B,), forces, stresses; each parameter meets one number a system."""
        pairs = diffnl.neighbor_pairs(self.positions, self.cell, self.pbc, CUTOFF, self.owner)
        of_system = self.owner[pairs.mapping[0]]
        wave = (self.reach.expand(len(self.cell))[of_system] * pairs.distances).sin()
        each = (1.0 - (pairs.distances / CUTOFF) ** 2).pow(3) * wave
        # index_put adds up in a fixed order on a GPU too.
        energy = each.new_zeros(len(self.cell)).index_put((of_system,), each, accumulate=True)
        energy = energy * self.strength.expand(len(self.cell))
        return energy, *diffnl.forces_and_stress(
            energy, self.positions, self.cell, self.owner, create_graph=True
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.strength, self.reach, self.positions, self.cell))


def loss_of(stress, forces):
    return stress.square().sum() + forces.square().sum()


@pytest.mark.parametrize("convert", [False, True], ids=["stress", "virial_and_back"])
def test_gradients_of_a_mixed_batch_are_those_of_the_crystals(convert, dtype, device):
    """Parameters, positions and cells, to the bit, of a loss that leaves the molecules out."""
    mixed, alone = Mixed((0, 1, 2, 3), device, dtype), Mixed((0, 1), device, dtype)
    found = []
    for batch in (mixed, alone):
        _, forces, stress = batch.predict()
        assert torch.isfinite(stress[:2]).all() and torch.isnan(stress[2:]).all()
        assert torch.isfinite(forces).all()
        if convert:
            virial = diffnl.stress.to_virial(stress, batch.cell)
            stress = diffnl.stress.from_virial(virial, batch.cell)
            assert torch.isnan(virial[2:]).all() and torch.isnan(stress[2:]).all()
            stress = stress + 1e-3 * virial
        found.append(batch.gradients(loss_of(stress[:2], forces[: len(alone.positions)])))
    (strength, reach, positions, cell), expected = found
    atoms = len(alone.positions)
    assert all(torch.equal(one, other) for one, other in zip((strength, reach), expected, strict=False))
    assert torch.equal(positions[:atoms], expected[2]) and torch.equal(cell[:2], expected[3])
    assert not positions[atoms:].any() and not cell[2:].any()
    assert expected[0].abs() > 0 and expected[3].abs().max() > 0


def test_a_loss_that_includes_the_nan_is_nan_and_spoils_no_gradient(device):
    mixed = Mixed((0, 1, 2, 3), device)
    loss = mixed.predict()[2].square().sum()
    assert torch.isnan(loss)
    expected = mixed.gradients(mixed.predict()[2][:2].square().sum())
    for one, other in zip(mixed.gradients(loss), expected, strict=True):
        assert torch.equal(one, other)


def test_one_molecule_has_no_stress(device):
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], device=device, requires_grad=True)
    cell = torch.zeros(3, 3, device=device, requires_grad=True)
    energy = diffnl.neighbor_pairs(positions, cell, False, CUTOFF).distances.square().sum()
    forces, stress = diffnl.forces_and_stress(energy, positions, cell, create_graph=True)
    assert torch.isnan(stress).all()
    gradients = torch.autograd.grad(forces.square().sum() + stress[0, 0].nan_to_num(), (positions, cell))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert math.isclose(forces[1, 2].item(), -4.0)


def test_hooks_between_the_cell_and_the_positions_get_tensors():
    """No gradient flows from positions to the cell, but hooks on the way there still get tensors."""
    seen = []
    cell = (3.0 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    scaled = 1.0 * cell
    scaled.register_hook(lambda gradient: seen.append(gradient.clamp(-1e9, 1e9)))
    fractions = torch.rand(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for positions in (fractions @ scaled, (fractions @ scaled).detach().requires_grad_()):
        energy = (positions[:, None] - positions).pow(2).sum() + cell.pow(2).sum()
        results.append(diffnl.forces_and_stress(energy, positions, cell))
    assert all(map(torch.equal, *results)) and seen and not seen[0].any()


def dependent_rows(turned, dtype, device):
    """A cell whose third row lies in the plane of the others: |det h| is 0, or after a rotation rounding."""
    rows = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [4.0, 4.0, 0.0]], dtype=torch.float64)
    if turned:
        q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double())[0]
        rows = rows @ q
    return rows.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("turned", [False, True], ids=["axes", "turned"])
def test_rows_in_one_plane_have_no_volume(turned, dtype, device):
    """Of a slab with such a row on its open axis, in stress and virial alike."""
    cell = dependent_rows(turned, dtype, device)
    positions = scatter(6, cubic(4.0), 17, 0.0, 1.0).to(device, dtype).requires_grad_()
    energy = energy_of(positions, cell, pbc=(True, True, False))
    forces, stress = diffnl.forces_and_stress(energy, positions, cell)
    assert torch.isfinite(forces).all() and torch.isnan(stress).all()
    ones = torch.ones_like(cell)
    assert torch.isnan(diffnl.stress.from_virial(ones, cell)).all()
    assert torch.isnan(diffnl.stress.to_virial(ones, cell)).all()
    assert not diffnl.stress.has_volume(cell)


@pytest.mark.parametrize("edge", [5e-15, 3.7, 5e13])
def test_a_volume_that_float32_cannot_hold(edge, device):
    """1.25e-43 is subnormal there, 1.25e41 infinite; the virial of a stress can be neither."""
    cell = (edge * torch.eye(3, dtype=torch.float64)).to(device, torch.float32)
    volume = cell[0, 0].double() ** 3
    stress = torch.full((3, 3), 1e-6 if edge > 1 else 1e6, device=device)
    virial = diffnl.stress.to_virial(stress, cell)
    torch.testing.assert_close(virial.double(), -volume * stress.double(), rtol=1e-6, atol=1e-44)
    back = diffnl.stress.from_virial(virial, cell)
    torch.testing.assert_close(back, stress, rtol=1e-6 if edge > 1 else 1e-5, atol=0.0)
