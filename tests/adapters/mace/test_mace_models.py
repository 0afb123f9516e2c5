"""MACE's models with the edge vectors of diffnl against themselves with MACE's own."""

import mace.data.neighborhood
import mace.modules.models
import mace.modules.utils
import numpy as np
import pytest
import torch
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress
from mace.calculators import MACECalculator
from mace.modules import MACE, ScaleShiftMACE
from random_mace import CUTOFF, FRAMES, batch_of, float64, given, network  # noqa: F401
from stresses import numerical_stress
from structures import CRYSTALS, OPEN, SLABS, STRUCTURES

import diffnl
from diffnl.adapters import mace as adapter

ADAPTER = "MACE"
PACKAGES = ("mace-torch",)

pytestmark = pytest.mark.usefixtures("float64")


def assert_close(ours, theirs, tolerance):
    scale = max(float(theirs.detach().abs().max()), 1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


EVERYTHING = {
    "compute_virials": True,
    "compute_stress": True,
    "compute_hessian": True,
    "compute_edge_forces": True,
    "compute_atomic_stresses": True,
}
KEYS = (
    "energy",
    "node_energy",
    "forces",
    "virials",
    "stress",
    "atomic_virials",
    "atomic_stresses",
    "edge_forces",
)


@pytest.fixture(params=[MACE, ScaleShiftMACE], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_energy_forces_stress_virials_and_hessian(kind, dtype, tolerance):
    model, batch = network(kind, dtype), batch_of(FRAMES, dtype)
    theirs = model(batch.to_dict(), **EVERYTHING)
    with adapter.install():
        ours = model(batch.to_dict(), **EVERYTHING)
    assert theirs["forces"].abs().max() > 1e-3 and theirs["stress"][0].abs().max() > 1e-5
    for key in (*KEYS, "hessian"):
        assert ours[key].shape == theirs[key].shape, key
        assert_close(ours[key], theirs[key], tolerance)


def test_one_structure_and_one_without_pairs(kind):
    model = network(kind)
    for frames in (
        [CRYSTALS["silicon"]],
        [OPEN["one_atom"]],
        [OPEN["one_atom"], CRYSTALS["copper_one_atom"]],
    ):
        batch = batch_of(frames)
        theirs = model(batch.to_dict(), compute_stress=True)
        with adapter.install():
            ours = model(batch.to_dict(), compute_stress=True)
        for key in ("energy", "forces", "stress"):
            assert_close(ours[key], theirs[key], 1e-12)


def test_training_on_forces_and_stress_gives_the_same_gradients(kind):
    batch = batch_of(FRAMES)

    def gradients(model):
        out = model(batch.clone().to_dict(), training=True, compute_stress=True)
        (out["forces"].square().sum() + 1e3 * out["stress"].square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    theirs = gradients(network(kind))
    with adapter.install():
        ours = gradients(network(kind))
    assert ours.keys() == theirs.keys() and len(theirs) > 10
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, 1e-11)


def test_stress_straight_from_the_cell(kind):
    """Without a strain in the model: `forces_and_stress` of its energy, by positions and cell."""
    model, batch = network(kind), batch_of([FRAMES[0], FRAMES[4]])
    theirs = model(batch.to_dict(), compute_stress=True)
    data = batch.to_dict()
    cell = data["cell"].view(-1, 3, 3).requires_grad_()
    data["cell"] = cell
    with adapter.install():
        energy = model(data, compute_force=False)["energy"]
    forces, stress = diffnl.forces_and_stress(energy, data["positions"], cell, data["batch"])
    assert_close(forces, theirs["forces"], 1e-12)
    assert_close(stress, theirs["stress"], 1e-12)


def test_a_strain_given_in_the_data_is_the_one_that_is_applied(kind):
    model, batch = network(kind), batch_of([FRAMES[0], FRAMES[4]])

    def outputs():
        strain = 0.01 * torch.arange(18.0).reshape(2, 3, 3)
        return model(batch.to_dict() | {"displacement": strain.requires_grad_()}, compute_stress=True)

    theirs = outputs()
    with adapter.install():
        ours = outputs()
    assert not torch.equal(theirs["energy"], model(batch.to_dict())["energy"])
    for key in ("energy", "forces", "stress", "virials"):
        assert_close(ours[key], theirs[key], 1e-12)


@pytest.mark.parametrize("strained", [True, False])
def test_graph_of_the_fields_of_mace(strained):
    batch = batch_of(FRAMES)
    ours, theirs = batch.to_dict(), batch.to_dict()
    context = adapter.prepare_graph(ours, compute_stress=strained)
    expected = mace.modules.utils.prepare_graph(theirs, compute_stress=strained)
    for name, value in expected._asdict().items():
        mine = getattr(context, name)
        if isinstance(value, torch.Tensor):
            assert (mine.shape, mine.dtype) == (value.shape, value.dtype)
            torch.testing.assert_close(mine, value, rtol=0, atol=1e-12)
        else:
            assert mine == value
    assert context.positions is ours["positions"] or strained
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["positions"], theirs["positions"], rtol=0, atol=0)


def virials_of_the_graph(data):
    """Gradients of an energy of the edges in positions and strain, taken in the state around the call."""
    context = adapter.prepare_graph(data, compute_stress=True)
    energy = torch.exp(-context.lengths).sum() + (context.vectors[:, 0] * context.vectors[:, 1]).sum()
    return energy, *torch.autograd.grad(energy, (context.positions, context.displacement))


def test_strain_and_virial_are_the_same_bits_under_autocast():
    """Products by `@` and `einsum` were in bfloat16, forward and backward."""
    batch = batch_of(FRAMES, torch.float32)
    expected = virials_of_the_graph(batch.clone().to_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = virials_of_the_graph(batch.clone().to_dict())
        theirs = mace.modules.utils.prepare_graph(batch.clone().to_dict(), compute_stress=True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    lengths = adapter.prepare_graph(batch.clone().to_dict(), compute_stress=True).lengths
    assert (theirs.lengths - lengths).abs().max() > 1e-3  # MACE's own are rounded: this test sees it


def test_virial_of_float32_far_from_the_origin():
    """The strain acts about an atom of each system: about the origin it would lose four of seven digits."""
    frames = [FRAMES[0].copy(), FRAMES[4].copy()]
    for atoms in frames:
        atoms.positions = np.float32(atoms.positions + 1e4)
    single, double = (batch_of(frames, dtype) for dtype in (torch.float32, torch.float64))
    found, exact = (virials_of_the_graph(batch.to_dict())[2] for batch in (single, double))
    assert (found.double() - exact).abs().max() < 2e-6 * exact.abs().max()


def test_tensors_of_the_data_are_not_written_to():
    """MACE's models look for strained positions in the data, where they replace a tensor; none is changed."""
    data = batch_of(FRAMES).to_dict()
    before = {name: value.clone() for name, value in data.items() if isinstance(value, torch.Tensor)}
    tensors = {name: data[name] for name in before}
    adapter.prepare_graph(data, compute_stress=True)
    for name, value in before.items():
        assert torch.equal(tensors[name], value), name
        assert data[name] is tensors[name] or name == "positions"


def test_ml_iap_stays_with_mace():
    vectors = torch.rand(6, 3)
    data = {"vectors": vectors, "natoms": (2, 1), "node_attrs": torch.eye(3), "lammps_class": None}
    data["batch"] = torch.zeros(3, dtype=torch.int64)
    context = adapter.prepare_graph(data, lammps_mliap=True)
    assert context.is_lammps and context.vectors is vectors


# ------------------------------------------------------------------------- calculators and training


@pytest.mark.parametrize("name", ["salt", "slab_with_oxygen", "ethanol", "wire"])
def test_calculator_of_a_saved_model(name, kind, tmp_path):
    torch.save(network(kind), tmp_path / "random.model")
    calculator = MACECalculator(tmp_path / "random.model", device="cpu", default_dtype="float64")

    def results():
        atoms = STRUCTURES[name].copy()
        atoms.calc = calculator
        calculator.reset()
        hessian = calculator.get_hessian(atoms) if name == "ethanol" else np.zeros(1)
        return [atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), hessian]

    theirs = results()
    calls = []
    with adapter.install() as undo, pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffnl, "pair_vectors", lambda *a, f=diffnl.pair_vectors: calls.append(a) or f(*a))
        undo.callback(lambda: calls.append("undone"))
        ours = results()
    assert len(calls) > 1 and calls[-1] == "undone"
    atoms = STRUCTURES[name]
    if name == "slab_with_oxygen":  # MACE divides by a volume that is not the slab's
        _, _, _, cell = mace.data.neighborhood.get_neighborhood(cutoff=CUTOFF, **given(atoms))
        theirs[2] *= abs(np.linalg.det(cell)) / atoms.get_volume()
    elif name != "salt":  # no volume: a stress that is nearly none
        assert np.abs(ours[2]).max() < 1e-3 and np.abs(theirs[2]).max() < 1e-3
        ours[2], theirs[2] = 0.0, 0.0
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("name", SLABS)
def test_stress_of_a_slab_is_that_of_its_energy(name, offset):
    """By differences of energies, over the volume of its own cell; MACE's is several times too small."""
    atoms = STRUCTURES[name].copy()
    atoms.positions += offset
    calculator = MACECalculator(models=network(ScaleShiftMACE), device="cpu", default_dtype="float64")

    def energy_of(atoms):
        return calculator.get_potential_energy(atoms)

    theirs = calculator.get_stress(atoms)
    with adapter.install():
        calculator.reset()
        ours = calculator.get_stress(atoms)
        expected = full_3x3_to_voigt_6_stress(numerical_stress(energy_of, atoms, step=1e-4))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert np.abs(ours).max() > 3 * np.abs(theirs).max()


@pytest.mark.parametrize("loss_on", ["all but the molecules", "everything"])
def test_training_beside_a_molecule_has_finite_gradients(kind, loss_on):
    """MACE divides the molecule's virial by the volume of the cell that it gets from us."""
    frames = [STRUCTURES[name] for name in ("salt", "slab_with_oxygen", "ethanol", "one_atom")]
    model, weights = network(kind), torch.tensor([1.0, 1.0, 0.0, 0.0] if "but" in loss_on else [1.0] * 4)
    with adapter.install():
        out = model(batch_of(frames).to_dict(), training=True, compute_stress=True)
        (weights[:, None, None] * out["stress"].square()).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 10 and all(gradient.isfinite().all() for gradient in gradients)
    assert out["stress"][2:].abs().max() < 1e-3 < out["stress"][1].abs().max()


def test_relaxation_of_a_cell():
    def relaxed():
        atoms = CRYSTALS["silicon"].copy()
        atoms.calc = MACECalculator(models=network(ScaleShiftMACE), device="cpu", default_dtype="float64")
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=3)
        return atoms.positions, atoms.cell.array

    theirs = relaxed()
    with adapter.install():
        ours = relaxed()
    assert abs(theirs[1] - CRYSTALS["silicon"].cell.array).max() > 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-9)
