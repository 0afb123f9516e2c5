import pickle
import typing

import numpy as np
import pytest
import torch
import torch.utils.data.dataloader
from ase import Atoms
from recipes import run_recipe
from structures import STRUCTURES, canonical, random_box

# SchNetPack 2.1.1 imports a private name that torch 2.13 no longer has.
if not hasattr(torch.utils.data.dataloader, "T_co"):
    torch.utils.data.dataloader.T_co = typing.TypeVar("T_co", covariant=True)

import schnetpack as spk  # noqa: E402
from schnetpack import properties  # noqa: E402
from schnetpack.data import ASEAtomsData, AtomsLoader  # noqa: E402
from schnetpack.interfaces import AtomsConverter  # noqa: E402
from schnetpack.transform import (  # noqa: E402
    ASENeighborList,
    CountNeighbors,
    MatScipyNeighborList,
    SkinNeighborList,
    TorchNeighborList,
)

from diffnl.adapters import schnetpack as adapter  # noqa: E402
from diffnl.adapters.schnetpack import DiffnlNeighborList  # noqa: E402

ADAPTER = "SchNetPack"
PACKAGES = ("schnetpack",)

SYSTEMS = {**STRUCTURES, "random_box": random_box()}
LISTS = {"ase": ASENeighborList, "matscipy": MatScipyNeighborList, "torch": TorchNeighborList}
# What they get wrong is in tests of its own: cells without volume, and atoms outside the cell.
WRONG = {"matscipy": {"wire"}, "torch": {"wire", "oxide_anywhere"}, "ase": set()}
COMPARED = [(name, other) for name in SYSTEMS for other in LISTS if name not in WRONG[other]]


def inputs_of(atoms, dtype=torch.float64):
    return {
        properties.idx: torch.tensor([0]),
        properties.Z: torch.tensor(atoms.numbers),
        properties.R: torch.tensor(atoms.positions, dtype=dtype),
        properties.cell: torch.tensor(atoms.cell.array, dtype=dtype)[None],
        properties.pbc: torch.tensor(atoms.pbc),
    }


def pairs_of(inputs, cell):
    i, j, offsets = (inputs[key] for key in (properties.idx_i, properties.idx_j, properties.offsets))
    shifts = np.linalg.lstsq(cell.T, offsets.double().numpy().T, rcond=None)[0].T
    return canonical(i, j, shifts, offsets)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND)
def test_offsets_are_the_same_bits_whatever_is_around(around):
    """S @ cell was done in bfloat16 under autocast."""
    inputs = inputs_of(SYSTEMS["silicon_sheared"], torch.float32)
    expected, found = dict(inputs), dict(inputs)
    DiffnlNeighborList(cutoff=5.0)(expected)
    with AROUND[around]():
        DiffnlNeighborList(cutoff=5.0)(found)
    for key in (properties.idx_i, properties.idx_j, properties.offsets):
        assert found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
    for key, value in inputs_of(SYSTEMS["silicon_sheared"], torch.float32).items():
        assert torch.equal(inputs[key], value)  # nothing was written to


def assert_same(atoms, mine, other):
    cell = atoms.cell.array
    for x, y in zip(pairs_of(mine, cell), pairs_of(other, cell), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cutoff", [2.9, 6.1])
@pytest.mark.parametrize("name, other", COMPARED)
def test_same_pairs(name, other, cutoff):
    atoms = SYSTEMS[name]
    assert_same(atoms, DiffnlNeighborList(cutoff)(inputs_of(atoms)), LISTS[other](cutoff)(inputs_of(atoms)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["random_box", "ethanol", "one_atom"])
def test_dtypes_and_order(name, dtype):
    mine, other = (nl(4.0)(inputs_of(SYSTEMS[name], dtype)) for nl in (DiffnlNeighborList, TorchNeighborList))
    for key in (properties.idx_i, properties.idx_j, properties.offsets):
        assert mine[key].dtype == other[key].dtype and mine[key].shape == other[key].shape
    assert torch.equal(mine[properties.idx_i], mine[properties.idx_i].sort().values)
    assert torch.equal(mine[properties.idx_i], other[properties.idx_i])
    counts = [CountNeighbors()(inputs)[properties.n_nbh] for inputs in (mine, other)]
    assert torch.equal(*counts)


def test_offsets_are_differentiable_in_the_cell():
    grads = []
    for nl in (DiffnlNeighborList, TorchNeighborList):
        inputs = inputs_of(SYSTEMS["random_box"])
        inputs[properties.cell].requires_grad_()
        out = nl(4.0)(inputs)
        assert not out[properties.idx_i].requires_grad
        out[properties.offsets].square().sum().backward()
        grads.append(inputs[properties.cell].grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_wire_where_matscipy_makes_up_a_cell():
    """A wire of period 2.9 Å: ASE's list is right, MatScipy's takes another period."""
    atoms = SYSTEMS["wire"]
    expected = ASENeighborList(3.5)(inputs_of(atoms))[properties.idx_i]
    assert len(DiffnlNeighborList(3.5)(inputs_of(atoms))[properties.idx_i]) == len(expected)
    assert len(MatScipyNeighborList(3.5)(inputs_of(atoms))[properties.idx_i]) != len(expected)


def test_atoms_anywhere_where_the_torch_list_loses_pairs():
    atoms = SYSTEMS["oxide_anywhere"]
    expected = len(ASENeighborList(2.9)(inputs_of(atoms))[properties.idx_i])
    assert len(DiffnlNeighborList(2.9)(inputs_of(atoms))[properties.idx_i]) == expected
    assert len(TorchNeighborList(2.9)(inputs_of(atoms))[properties.idx_i]) < expected


def test_one_pair_where_the_torch_list_fails():
    inputs = inputs_of(Atoms("H2", [[0, 0, 0], [0.7, 0, 0]]))
    out = DiffnlNeighborList(1.0)(dict(inputs))
    assert (out[properties.idx_i].tolist(), out[properties.idx_j].tolist()) == ([0, 1], [1, 0])
    with pytest.raises(RuntimeError, match="zero-dimensional"):
        TorchNeighborList(1.0)(dict(inputs))


def test_cutoff_is_strict():
    inputs = inputs_of(Atoms("H3", [[0, 0, 0], [1.5, 0, 0], [0, 0.5, 1.0]]))
    for nl in (DiffnlNeighborList, ASENeighborList, MatScipyNeighborList):
        assert 1 not in nl(1.5)(dict(inputs))[properties.idx_j].tolist()
        assert 1 in nl(1.5001)(dict(inputs))[properties.idx_j].tolist()


def test_errors():
    inputs = inputs_of(SYSTEMS["salt"])
    with pytest.raises(ValueError, match="`cutoff` must be finite and > 0"):
        DiffnlNeighborList(-1.0)(dict(inputs))
    inputs[properties.cell] = torch.zeros(1, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="`cell`"):
        DiffnlNeighborList(3.0)(inputs)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        adapter.Nothing  # noqa: B018


def network(representation, cutoff=5.0):
    torch.manual_seed(0)
    options = {
        "n_atom_basis": 8,
        "n_interactions": 2,
        "radial_basis": spk.nn.GaussianRBF(n_rbf=10, cutoff=cutoff),
        "cutoff_fn": spk.nn.CosineCutoff(cutoff),
    }
    return spk.model.NeuralNetworkPotential(
        representation=getattr(spk.representation, representation)(**options),
        input_modules=[spk.atomistic.Strain(), spk.atomistic.PairwiseDistances()],
        output_modules=[
            spk.atomistic.Atomwise(n_in=8, output_key="energy"),
            spk.atomistic.Forces(calc_stress=True, energy_key="energy"),
        ],
    )


@pytest.mark.parametrize("other", ["ase", "matscipy"])  # the torch list does not take the converter's pbc
@pytest.mark.parametrize("representation", ["SchNet", "PaiNN"])
def test_model(representation, other):
    """A batch of structures through the ASE interface: energies, forces and stresses of a random network."""
    model = network(representation).double()
    systems = [SYSTEMS[name] for name in ("silicon_sheared", "random_box", "magnesium")]
    results = []
    for nl in (DiffnlNeighborList, LISTS[other]):
        converter = AtomsConverter(neighbor_list=nl(5.0), dtype=torch.float64)
        results.append(model(converter(systems)))
    for key in ("energy", "forces", "stress"):
        assert results[1][key].abs().max() > 0
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-9, atol=1e-10)


def test_calculator(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a whole model, written here
    torch.save(network("PaiNN"), tmp_path / "model")
    values = []
    for nl in (DiffnlNeighborList, ASENeighborList):
        atoms = SYSTEMS["salt"].copy()
        atoms.calc = spk.interfaces.SpkCalculator(
            str(tmp_path / "model"), neighbor_list=nl(5.0), stress_key="stress", dtype=torch.float64
        )
        values.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    for x, y in zip(*values, strict=True):
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)


def test_skin_and_copies():
    """Inside SkinNeighborList, which raises the cutoff of the list it wraps; and pickled."""
    nl = pickle.loads(pickle.dumps(DiffnlNeighborList(4.0)))
    assert type(nl) is DiffnlNeighborList and isinstance(nl, spk.transform.NeighborListTransform)
    atoms = SYSTEMS["random_box"]
    kept = SkinNeighborList(nl, cutoff_skin=0.5)(inputs_of(atoms))
    assert_same(atoms, kept, ASENeighborList(4.0)(inputs_of(atoms)))


def test_data_loader_workers(tmp_path):
    systems = [SYSTEMS[name] for name in ("salt", "ethanol", "random_box")]
    batches = []
    for nl in (DiffnlNeighborList, ASENeighborList):
        data = ASEAtomsData.create(
            str(tmp_path / f"{nl.__name__}.db"), distance_unit="Ang", property_unit_dict={"energy": "eV"}
        )
        data.add_systems([{"energy": np.zeros(1)} for _ in systems], systems)
        data.transforms = [nl(4.0)]
        (batch,) = AtomsLoader(data, batch_size=3, num_workers=1)
        i, j, offsets = (batch[key] for key in (properties.idx_i, properties.idx_j, properties.offsets))
        order = np.lexsort((*offsets.numpy().round(6).T, j, i))
        batches.append((i[order], j[order], offsets[order]))
    for x, y in zip(*batches, strict=True):
        torch.testing.assert_close(x, y)


def test_recipe():
    inputs = run_recipe("SchNetPack")["inputs"]
    assert inputs[properties.offsets].shape == (len(inputs[properties.idx_i]), 3)
    assert len(inputs[properties.idx_i]) > 0
