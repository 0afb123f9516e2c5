"""MACE's neighbour list, and its models with the edge vectors of diffnl, against MACE's own."""

from copy import deepcopy

import mace.data as mace_data
import mace.data.neighborhood
import mace.modules.models
import mace.modules.utils
import numpy as np
import pytest
import torch
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from e3nn import o3
from mace.calculators import MACECalculator
from mace.data import AtomicData, config_from_atoms
from mace.modules import MACE, ScaleShiftMACE, interaction_classes
from mace.tools import AtomicNumberTable, torch_geometric
from recipes import run_recipe
from structures import CRYSTALS, OPEN, STRUCTURES, canonical, random_box

import diffnl
from diffnl.adapters import mace as adapter

ADAPTER = "MACE"
PACKAGES = ("mace-torch",)

CUTOFF = 4.0
TABLE = AtomicNumberTable(sorted({z for atoms in STRUCTURES.values() for z in map(int, atoms.numbers)}))
FRAMES = [STRUCTURES[name] for name in ("silicon_sheared", "slab_with_oxygen", "wire", "ethanol", "salt")]


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------- the list


def given(atoms):
    return {"positions": atoms.positions, "pbc": tuple(atoms.pbc.tolist()), "cell": atoms.cell.array.copy()}


def both(**arguments):
    return [
        function(**deepcopy(arguments))
        for function in (adapter.get_neighborhood, mace.data.neighborhood.get_neighborhood)
    ]


def assert_same_neighborhood(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (type(mine), mine.dtype, mine.shape) == (type(other), other.dtype, other.shape)
    assert (np.diff(ours[0][0]) >= 0).all()
    ours_sorted, theirs_sorted = (canonical(*out[0], out[2], out[1]) for out in (ours, theirs))
    for mine, other in zip(ours_sorted, theirs_sorted, strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(ours[3], theirs[3])


@pytest.mark.parametrize("cutoff", [2.6, CUTOFF, 7.3])
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_neighborhood(name, cutoff):
    assert_same_neighborhood(*both(cutoff=cutoff, **given(STRUCTURES[name])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False), None])
def test_same_neighborhood_of_any_dtype_and_boundary(pbc, dtype):
    box = random_box()
    arguments = {"positions": box.positions.astype(dtype), "pbc": pbc, "cell": box.cell.array.copy()}
    if pbc == (True, False, True):
        arguments["pbc"] = np.array(pbc)
    assert_same_neighborhood(*both(cutoff=5.0, **arguments))
    arguments["positions"] = np.asfortranarray(arguments["positions"])[::-1]
    assert_same_neighborhood(*both(cutoff=5.0, **arguments))


def test_integers_in_the_cell_stay_integers():
    positions = 3.0 * np.random.default_rng(0).random((5, 3))
    for pbc in ((True, True, True), (True, False, True)):
        ours, theirs = both(positions=positions, cutoff=2.0, pbc=pbc, cell=np.diag([3, 3, 3]))
        assert ours[3].dtype == ours[1].dtype == np.int64
        assert_same_neighborhood(ours, theirs)


@pytest.mark.parametrize("cell", [None, np.zeros((3, 3))])
def test_no_cell_is_the_identity_made_longer(cell):
    ours, theirs = both(positions=OPEN["ethanol"].positions, cutoff=2.0, cell=cell)
    assert ours[3][0, 0] > 10.0
    assert_same_neighborhood(ours, theirs)


def test_the_cell_returned_is_the_one_given_with_new_rows_on_open_axes():
    for function in (adapter.get_neighborhood, mace.data.neighborhood.get_neighborhood):
        slab = given(STRUCTURES["slab_with_oxygen"])
        before = slab["cell"].copy()
        cell = function(cutoff=CUTOFF, **slab)[3]
        assert cell is slab["cell"]
        np.testing.assert_array_equal(cell[:2], before[:2])
        largest = np.abs(slab["positions"]).max()
        np.testing.assert_allclose(cell[2], [0.0, 0.0, 5 * CUTOFF * (1 + largest)], rtol=1e-15)


@pytest.mark.parametrize("true_self_interaction", [False, True])
def test_strict_cutoff_coincident_atoms_and_self_pairs(true_self_interaction):
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    for cutoff, pairs in ((1.0, 2), (np.nextafter(1.0, 2.0), 6)):
        ours, theirs = both(positions=positions, cutoff=cutoff, true_self_interaction=true_self_interaction)
        assert ours[0].shape == (2, pairs)
        assert_same_neighborhood(ours, theirs)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"pbc": (1, 0, 0)}, AssertionError),
        ({"pbc": (True, True)}, AssertionError),
        ({"cell": np.eye(2)}, AssertionError),
        ({"positions": np.zeros((0, 3))}, ValueError),
        ({"pbc": (True, True, True), "cell": np.diag([3.0, 3.0, 0.0])}, ValueError),
        ({"cutoff": 0.0}, ValueError),
    ],
)
def test_errors_of_mace(bad, error):
    for function in (adapter.get_neighborhood, mace.data.neighborhood.get_neighborhood):
        with pytest.raises(error):
            function(**deepcopy({"positions": np.ones((2, 3)), "cutoff": 2.0} | bad))


@pytest.mark.parametrize(
    ("bad", "message", "theirs"),
    [
        # A cube of 1 Å, full of images.
        ({"pbc": (True, True, True)}, "`cell` must be given where `pbc` is true", 64),
        ({"positions": np.array([[0.0, 0, 0], [np.nan, 0, 0]])}, "`positions` must be finite", 0),
        ({"cutoff": -2.0}, "`cutoff` must be finite and > 0", 2),
    ],
)
def test_errors_where_mace_says_nothing(bad, message, theirs):
    arguments = {"positions": np.array([[0.0, 0, 0], [0.4, 0, 0]]), "cutoff": 2.0} | bad
    assert mace.data.neighborhood.get_neighborhood(**deepcopy(arguments))[0].shape[1] >= theirs
    with pytest.raises(ValueError, match=message):
        adapter.get_neighborhood(**arguments)


# ----------------------------------------------------------------------------------------- the models


def network(kind, dtype=torch.float64):
    torch.manual_seed(0)
    options = {
        "r_max": CUTOFF,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": interaction_classes["RealAgnosticResidualInteractionBlock"],
        "interaction_cls_first": interaction_classes["RealAgnosticResidualInteractionBlock"],
        "num_interactions": 2,
        "num_elements": len(TABLE),
        "hidden_irreps": o3.Irreps("4x0e + 4x1o"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.linspace(-2.0, 1.0, len(TABLE)),
        "avg_num_neighbors": 10.0,
        "atomic_numbers": TABLE.zs,
        "correlation": 2,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8, 8],
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    }
    if kind is ScaleShiftMACE:
        options |= {"atomic_inter_scale": 1.3, "atomic_inter_shift": 0.2}
    return kind(**options).to(dtype).eval()


def batch_of(frames, dtype=torch.float64):
    torch.set_default_dtype(dtype)
    data = [
        AtomicData.from_config(config_from_atoms(atoms), z_table=TABLE, cutoff=CUTOFF) for atoms in frames
    ]
    (batch,) = torch_geometric.dataloader.DataLoader(data, batch_size=len(data))
    return batch


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
    def gradients(model):
        out = model(batch_of(FRAMES).to_dict(), training=True, compute_stress=True)
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


def test_ml_iap_stays_with_mace():
    vectors = torch.rand(6, 3)
    data = {"vectors": vectors, "natoms": (2, 1), "node_attrs": torch.eye(3), "lammps_class": None}
    data["batch"] = torch.zeros(3, dtype=torch.int64)
    context = adapter.prepare_graph(data, lammps_mliap=True)
    assert context.is_lammps and context.vectors is vectors


# -------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_and_lengths_of_mace(normalize, dtype):
    data = batch_of(FRAMES, dtype)
    theirs = mace.modules.utils.get_edge_vectors_and_lengths(
        data.positions, data.edge_index, data.shifts, normalize, 1e-3
    )
    for cell in (data.cell, data.cell.view(-1, 3, 3)):
        ours = adapter.edge_vectors_and_lengths(
            data.positions, data.edge_index, data.unit_shifts, cell, data.batch, normalize, 1e-3
        )
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.shape, mine.dtype) == (other.shape, dtype)
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_derivatives_of_the_block():
    data = batch_of([CRYSTALS["silicon"], STRUCTURES["graphene"]])

    def block(positions, cell):
        edges = data.edge_index[:, ::7], data.unit_shifts[::7]
        return adapter.edge_vectors_and_lengths(positions, *edges, cell, data.batch)

    inputs = data.positions.requires_grad_(), data.cell.requires_grad_()
    assert torch.autograd.gradcheck(block, inputs)
    assert torch.autograd.gradgradcheck(block, inputs)


# ------------------------------------------------------------------------------- installed in MACE


def test_install_is_undone_and_nests():
    places = [
        (mace_data, "get_neighborhood"),
        (mace_data.atomic_data, "get_neighborhood"),
        (mace_data.neighborhood, "get_neighborhood"),
        (mace.modules.models, "prepare_graph"),
        (mace.modules.extensions, "prepare_graph"),
    ]

    def now():
        return [getattr(module, name) for module, name in places]

    before, ours = now(), [getattr(adapter, name) for _, name in places]
    undo = adapter.install()
    assert now() == ours
    with adapter.install():
        assert now() == ours
    assert now() == ours
    undo.close()
    assert now() == before
    with pytest.raises(ZeroDivisionError), adapter.install():
        raise ZeroDivisionError
    assert now() == before


def test_data_of_a_configuration():
    for atoms in STRUCTURES.values():
        config = config_from_atoms(atoms)
        theirs = AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF)
        with adapter.install():
            ours = AtomicData.from_config(config, z_table=TABLE, cutoff=CUTOFF)
        assert ours.keys == theirs.keys
        for key in ("edge_index", "shifts", "unit_shifts", "cell", "rcell", "volume", "positions"):
            assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key
        for key in ("cell", "rcell", "volume"):
            assert torch.equal(ours[key], theirs[key])
        pairs = [canonical(*data.edge_index, data.unit_shifts, data.shifts) for data in (ours, theirs)]
        for mine, other in zip(*pairs, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", ["salt", "slab_with_oxygen", "ethanol", "wire"])
def test_calculator_of_a_saved_model(name, kind, tmp_path):
    torch.save(network(kind), tmp_path / "random.model")
    calculator = MACECalculator(tmp_path / "random.model", device="cpu", default_dtype="float64")

    def results():
        atoms = STRUCTURES[name].copy()
        atoms.calc = calculator
        calculator.reset()
        hessian = calculator.get_hessian(atoms) if name == "ethanol" else np.zeros(1)
        return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), hessian

    theirs = results()
    calls = []
    with adapter.install() as undo, pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffnl, "pair_vectors", lambda *a, f=diffnl.pair_vectors: calls.append(a) or f(*a))
        undo.callback(lambda: calls.append("undone"))
        ours = results()
    assert len(calls) > 1 and calls[-1] == "undone"
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-10)


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


def test_recipe():
    torch.set_default_dtype(torch.float32)
    names = run_recipe("MACE")
    assert names["forces"].shape == (8, 3) and names["stress"].abs().max() > 1e-4
    assert mace.modules.models.prepare_graph is mace.modules.utils.prepare_graph
