"""The backend "diffnl" in NequIP's registry: the lists of its own backends, and the same models on them."""

import copy

import numpy as np
import pytest
import torch
import torch_sim
from allegro.model import AllegroModel
from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase, from_dict
from nequip.data._nl import NEIGHBORLIST_BACKEND_OPTIONS
from nequip.data.transforms import (
    ChemicalSpeciesToAtomTypeMapper,
    NeighborListTransform,
    SortedNeighborListTransform,
)
from nequip.integrations.ase import NequIPCalculator
from nequip.integrations.torchsim import NequIPTorchSimCalc
from nequip.integrations.utils import basic_transforms
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state
from recipes import run_recipe
from structures import CRYSTALS, OPEN, SLABS, STRUCTURES, canonical, random_box

from diffnl.adapters import nequip

ADAPTER = "NequIP and Allegro"
PACKAGES = ("nequip", "nequip-allegro")

R_MAX = 4.5
SPECIES = sorted({symbol for atoms in STRUCTURES.values() for symbol in atoms.symbols})
FRAMES = [STRUCTURES[name] for name in ("silicon_sheared", "slab_with_oxygen", "wire", "ethanol", "salt")]


@pytest.fixture(scope="module", autouse=True)
def registered():
    set_global_state()
    nequip.register()
    yield
    del NEIGHBORLIST_BACKEND_OPTIONS["diffnl"]


def pairs_of(data):
    i, j = data["edge_index"]
    return canonical(i, j, data["edge_cell_shift"])


def assert_same_pairs(ours, theirs):
    for mine, other in zip(pairs_of(ours), pairs_of(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)


def batch_of(frames):
    return AtomicDataDict.batched_from_list([from_ase(atoms) for atoms in frames])


def takes(backend, atoms):
    """Whether a backend of NequIP's takes a structure."""
    if backend == "vesin":
        return len(set(atoms.pbc)) == 1
    return backend != "alchemiops" or not atoms.pbc.any() or atoms.cell.volume > 0


@pytest.mark.parametrize("r_max", [2.6, R_MAX, 7.3])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name, atoms in STRUCTURES.items()
        for backend in ("ase", "matscipy", "vesin", "alchemiops")
        if takes(backend, atoms)
    ],
)
def test_same_pairs_as_each_backend(name, r_max, backend):
    atoms = STRUCTURES[name]
    ours = compute_neighborlist_(from_ase(atoms), r_max, backend="diffnl")
    assert_same_pairs(ours, compute_neighborlist_(from_ase(atoms), r_max, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_the_keys_shapes_and_dtypes_of_the_default_backend_and_nothing_else(dtype):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in from_ase(random_box()).items()}
    ours = compute_neighborlist_(dict(given), R_MAX, backend="diffnl")
    theirs = compute_neighborlist_(dict(given), R_MAX)
    assert ours.keys() == theirs.keys() == given.keys() | {"edge_index", "edge_cell_shift"}
    for key in ours:
        assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape)
        assert ours[key].is_contiguous() and not ours[key].requires_grad
    assert all(ours[key] is given[key] for key in given)
    assert (ours["edge_index"][0].diff() >= 0).all()
    assert_same_pairs(ours, theirs)


def test_a_batch_is_searched_at_once_and_equals_its_frames(monkeypatch):
    searches = []
    search = nequip.diffnl.neighbor_pairs
    monkeypatch.setattr(nequip.diffnl, "neighbor_pairs", lambda *a: searches.append(a) or search(*a))
    given = batch_of(FRAMES)
    ours = compute_neighborlist_(given, R_MAX, backend="diffnl")
    assert ours is given and len(searches) == 1
    theirs = compute_neighborlist_(batch_of(FRAMES), R_MAX)
    assert ours.keys() == theirs.keys()
    assert_same_pairs(ours, theirs)
    for index, atoms in enumerate(FRAMES):
        alone = compute_neighborlist_(from_ase(atoms), R_MAX, backend="diffnl")
        assert_same_pairs(AtomicDataDict.frame_from_batched(ours, index), alone)


def test_a_batch_of_one_and_an_atom_without_pairs():
    for frames in ([OPEN["one_atom"]], [OPEN["one_atom"], OPEN["ethanol"], OPEN["one_atom"]]):
        ours = compute_neighborlist_(batch_of(frames), R_MAX, backend="diffnl")
        theirs = compute_neighborlist_(batch_of(frames), R_MAX)
        assert "batch" in ours and ours["edge_cell_shift"].shape == theirs["edge_cell_shift"].shape
        assert_same_pairs(ours, theirs)


@pytest.mark.parametrize("frames", [1, 3])
def test_without_a_cell_there_are_no_shifts(frames):
    def molecules():
        one = from_dict({"pos": OPEN["ethanol"].positions, "atomic_numbers": OPEN["ethanol"].numbers})
        return AtomicDataDict.batched_from_list([dict(one) for _ in range(frames)]) if frames > 1 else one

    ours = compute_neighborlist_(molecules(), R_MAX, backend="diffnl")
    theirs = compute_neighborlist_(molecules(), R_MAX)
    assert "cell" not in ours and "edge_cell_shift" not in ours and ours.keys() == theirs.keys()
    assert sorted(map(tuple, ours["edge_index"].T.tolist())) == sorted(
        map(tuple, theirs["edge_index"].T.tolist())
    )


def test_a_cell_without_boundary_conditions_is_an_error_and_not_a_molecule():
    data = from_ase(CRYSTALS["salt"])
    del data["pbc"]
    assert not compute_neighborlist_(dict(data), R_MAX)["edge_cell_shift"].any()
    with pytest.raises(ValueError, match="`pbc` must be in the data where there is a cell"):
        compute_neighborlist_(dict(data), R_MAX, backend="diffnl")
    data["cell"] = torch.zeros_like(data["cell"])
    ours = compute_neighborlist_(dict(data), R_MAX, backend="diffnl")
    assert_same_pairs(ours, compute_neighborlist_(dict(data), R_MAX))


def test_a_float64_cell_keeps_its_digits_beside_float32_positions():
    data = {
        "pos": torch.zeros(1, 3, dtype=torch.float32),
        "cell": (3.0 - 1e-10) * torch.eye(3, dtype=torch.float64)[None],
    }
    data["pbc"] = torch.ones(1, 3, dtype=torch.bool)
    ours = compute_neighborlist_(dict(data), 3.0, backend="diffnl")
    assert ours["edge_cell_shift"].dtype == torch.float32
    assert ours["edge_index"].shape == (2, 6)  # none of them for a cell rounded to float32
    assert_same_pairs(ours, compute_neighborlist_(dict(data), 3.0))


def test_positions_that_require_a_gradient_stay_out_of_the_list():
    data = from_ase(CRYSTALS["silicon"])
    data["pos"].requires_grad_()
    ours = compute_neighborlist_(data, R_MAX, backend="diffnl")
    assert not ours["edge_cell_shift"].requires_grad and ours["pos"].requires_grad


def test_a_periodic_axis_without_a_vector_is_an_error_and_not_one_of_length_1():
    data = from_ase(OPEN["ethanol"])
    data["pbc"] = torch.tensor([[False, False, True]])
    theirs = compute_neighborlist_(dict(data), 2.5)
    assert theirs["edge_cell_shift"].any()  # of images 1 Å apart; the cell of the edge vectors is zero
    with pytest.raises(
        ValueError, match="`cell` must have linearly independent vectors on its periodic axes"
    ):
        compute_neighborlist_(dict(data), 2.5, backend="diffnl")
    del data["cell"]
    with pytest.raises(ValueError):
        compute_neighborlist_(dict(data), 2.5)
    with pytest.raises(
        ValueError, match="`cell` must have linearly independent vectors on its periodic axes"
    ):
        compute_neighborlist_(dict(data), 2.5, backend="diffnl")


def test_registers_again_and_under_another_name():
    nequip.register()
    nequip.register("another")
    spec = NEIGHBORLIST_BACKEND_OPTIONS.pop("another")
    assert spec == NEIGHBORLIST_BACKEND_OPTIONS["diffnl"]
    assert spec.supports_cpu and spec.supports_cuda
    with pytest.raises(TypeError, match="max_neighbors"):
        data = from_ase(CRYSTALS["silicon"])
        compute_neighborlist_(data, R_MAX, backend="diffnl", backend_kwargs={"max_neighbors": 10})


# ----------------------------------------------------------------------------------- cutoffs and models

MAPPER = ChemicalSpeciesToAtomTypeMapper(
    model_type_names=SPECIES, chemical_species_to_atom_type_map={name: name for name in SPECIES}
)
CUTOFFS = {
    name: {other: 2.8 + 0.06 * (k + m) for m, other in enumerate(SPECIES)} for k, name in enumerate(SPECIES)
}


@pytest.mark.parametrize("kind", [NeighborListTransform, SortedNeighborListTransform])
def test_cutoffs_per_edge_type_prune_the_list(kind):
    options = {"per_edge_type_cutoff": CUTOFFS, "type_names": SPECIES}
    ours = kind(6.0, backend="diffnl", **options)(MAPPER(batch_of(FRAMES)))
    theirs = kind(6.0, **options)(MAPPER(batch_of(FRAMES)))
    whole = NeighborListTransform(6.0, backend="diffnl")(MAPPER(batch_of(FRAMES)))
    assert ours["edge_index"].shape[1] < whole["edge_index"].shape[1]
    assert ours.keys() == theirs.keys()
    assert_same_pairs(ours, theirs)


def network(kind, dtype="float64", cutoffs=None):
    options = {
        "seed": 0,
        "model_dtype": dtype,
        "r_max": R_MAX,
        "type_names": SPECIES,
        "avg_num_neighbors": 20.0,
        "per_type_energy_scales": 1.0,
        "per_type_energy_shifts": 0.0,
        "per_edge_type_cutoff": cutoffs,
        "l_max": 1,
    }
    if kind == "nequip":
        return NequIPGNNModel(num_layers=2, num_features=8, radial_mlp_width=8, **options).eval()
    embed = {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 4, "module_output_dim": 8}
    widths = {"num_layers": 2, "num_scalar_features": 8, "num_tensor_features": 4}
    widths |= {"allegro_mlp_hidden_layers_width": 8, "readout_mlp_hidden_layers_width": 8}
    return AllegroModel(radial_chemical_embed=embed, **widths, **options).eval()


def results(model, frames, backend, cutoffs=None):
    transform = NeighborListTransform(R_MAX, cutoffs, SPECIES, backend=backend)
    data = AtomicDataDict.batched_from_list([MAPPER(from_ase(atoms)) for atoms in frames])
    return {
        key: value.detach() if not model.training else value for key, value in model(transform(data)).items()
    }


KEYS = ("total_energy", "atomic_energy", "forces", "stress", "virial")


def assert_same_results(ours, theirs, tolerance):
    for key in KEYS:
        scale = theirs[key].nan_to_num().abs().max()
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=0, atol=tolerance * max(float(scale), 1.0), equal_nan=True
        )


@pytest.mark.parametrize("kind", ["nequip", "allegro"])
@pytest.mark.parametrize("name", CRYSTALS | SLABS | {"ethanol": None, "wire": None})
def test_model_gives_the_same_numbers(kind, name):
    model = network(kind)
    ours, theirs = (results(model, [STRUCTURES[name]], backend) for backend in ("diffnl", "matscipy"))
    assert theirs["forces"].abs().max() > 1e-4 or len(STRUCTURES[name]) == 1
    assert_same_results(ours, theirs, 1e-12)


@pytest.mark.parametrize("cutoffs", [None, CUTOFFS], ids=["one_cutoff", "per_edge_type"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_model_gives_the_same_numbers_for_a_batch(kind, dtype, tolerance, cutoffs):
    model = network(kind, dtype, cutoffs)
    ours, theirs = (results(model, FRAMES, backend, cutoffs) for backend in ("diffnl", "matscipy"))
    assert ours["stress"].shape == (len(FRAMES), 3, 3) and not ours["stress"][0].isnan().any()
    assert_same_results(ours, theirs, tolerance)
    single = results(model, FRAMES[:1], "diffnl", cutoffs)
    torch.testing.assert_close(single["stress"][0], ours["stress"][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_training_on_forces_and_stress_gives_the_same_gradients(kind):
    gradients = []
    for backend in ("diffnl", "matscipy"):
        model = network(kind).train()
        out = results(model, FRAMES[:2], backend)
        (out["forces"].square().sum() + out["stress"].square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and any(g.abs().max() > 1e-6 for g in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def test_edge_vectors_would_leave_out_forces_and_stress():
    """Why the backend writes pairs alone."""
    model = network("nequip")
    data = NeighborListTransform(R_MAX, backend="diffnl")(MAPPER(from_ase(CRYSTALS["salt"])))
    assert "edge_vectors" not in data
    i, j = data["edge_index"]
    vectors = data["pos"][j] - data["pos"][i] + data["edge_cell_shift"] @ data["cell"][0]
    out = model(data | {"edge_vectors": vectors})
    assert "edge_forces" in out and "stress" not in out


@pytest.mark.parametrize("cutoffs", [None, CUTOFFS], ids=["one_cutoff", "per_edge_type"])
@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_ase_calculator(kind, cutoffs):
    model = network(kind, cutoffs=cutoffs)

    def calculator(backend):
        same = {name: name for name in SPECIES}
        # The numbers of a model's metadata are strings, as in a compiled file.
        transforms = basic_transforms(copy.deepcopy(model.metadata), R_MAX, SPECIES, same, backend)
        assert (transforms[1]._pruner is None) == (cutoffs is None)
        return NequIPCalculator(model, "cpu", transforms=transforms)

    for name in ("salt", "slab_with_oxygen"):
        ours, theirs = STRUCTURES[name].copy(), STRUCTURES[name].copy()
        ours.calc, theirs.calc = calculator("diffnl"), calculator("matscipy")
        for mine, other in (
            (ours.get_potential_energy(), theirs.get_potential_energy()),
            (ours.get_forces(), theirs.get_forces()),
            (ours.get_stress(), theirs.get_stress()),
        ):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_torchsim_calculator(kind):
    """Its batch has one row of flags for all systems."""
    model = network(kind)
    atoms = [CRYSTALS[name] for name in ("salt", "silicon_sheared", "magnesium")]
    state = torch_sim.initialize_state(atoms, device=torch.device("cpu"), dtype=torch.float64)
    ours, theirs = (
        NequIPTorchSimCalc(model, transforms=[MAPPER, NeighborListTransform(R_MAX, backend=backend)])(state)
        for backend in ("diffnl", "matscipy")
    )
    for key in ("energy", "forces", "stress"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-11)


def test_recipe():
    names = run_recipe("NequIP and Allegro")
    assert_same_pairs(names["data"], compute_neighborlist_(from_ase(names["atoms"]), 5.0))
