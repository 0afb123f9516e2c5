"""CHGNet with its trained weights: our graph against its own, and what the model makes of both."""

import copy
import pickle
import socket

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.spacegroup import crystal
from chgnet.graph import CrystalGraphConverter
from chgnet.model import CHGNet, CHGNetCalculator, StructOptimizer
from pymatgen.io.ase import AseAtomsAdaptor
from recipes import run_recipe
from stresses import numerical_stress
from structures import CRYSTALS, SHEAR, SLABS, random_box, rattled, strained

from diffnl.adapters.chgnet import GraphConverter, use_diffnl
from diffnl.stress import GPA, to_gpa

ADAPTER = "CHGNet"
PACKAGES = ("chgnet", "pymatgen")

SITES = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
PEROVSKITE = crystal(["Sr", "Ti", "O"], SITES, spacegroup=221, cellpar=[3.905] * 3 + [90] * 3)
SYSTEMS = (
    CRYSTALS
    | SLABS
    | {
        "perovskite": rattled(PEROVSKITE),
        "perovskite_perfect": PEROVSKITE,
        "perovskite_sheared": strained(rattled(PEROVSKITE), SHEAR),
        "perovskite_stretched": strained(rattled(PEROVSKITE * (2, 1, 1)), 0.03 * np.eye(3)),
    }
)
# Two orders of the same sum differ by this much in float32: see `test_other_orders_of_its_own_list`.
BOUNDS = {"energy (meV/atom)": 4e-3, "forces (eV/Å)": 1e-4, "stress (GPa)": 1e-3, "moments (µB)": 5e-6}
KEYS = dict(zip(BOUNDS, "efsm", strict=True))
largest = dict.fromkeys(BOUNDS, 0.0)


def structure_of(atoms):
    return AseAtomsAdaptor.get_structure(atoms)


@pytest.fixture(scope="module")
def model():
    """The weights of the wheel; no connection is made for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the weights are not in the wheel"))
        return CHGNet.load(use_device="cpu", verbose=False)


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nCHGNet, largest difference to its own list:", *(f"{k} {v:.2g}" for k, v in largest.items()))


def differences(one: dict, two: dict) -> dict[str, float]:
    scale = {"energy (meV/atom)": 1e3}
    return {name: scale.get(name, 1.0) * float(np.abs(one[k] - two[k]).max()) for name, k in KEYS.items()}


def rows(table: np.ndarray) -> np.ndarray:
    return table[np.lexsort(table.T[::-1])] if table.size else table.reshape(0)


def bonds_and_angles(graph) -> tuple[np.ndarray, np.ndarray]:
    """Bonds (i, j, S) and angles (center, bond, bond), sorted, whatever their numbers are."""
    bonds = torch.cat([graph.atom_graph.reshape(-1, 2), graph.neighbor_image.int()], 1).numpy()
    first, second = graph.bond_graph.reshape(-1, 5)[:, [2, 4]].T.long()
    center = graph.bond_graph.reshape(-1, 5)[:, :1].numpy()
    return rows(bonds), rows(np.concatenate([center, bonds[first], bonds[second]], 1))


def assert_same_graph(ours, own) -> None:
    for one, two in zip(bonds_and_angles(ours), bonds_and_angles(own), strict=True):
        np.testing.assert_array_equal(one, two)


def assert_consistent(graph) -> None:
    """Each undirected bond has two directed ones, one the reverse of the other, and the maps agree."""
    bonds = torch.cat([graph.atom_graph, graph.neighbor_image.int()], 1)
    to_undirected, to_directed = graph.directed2undirected.long(), graph.undirected2directed.long()
    assert (to_undirected[to_directed] == torch.arange(len(to_directed))).all()
    both = to_undirected.argsort(stable=True).view(-1, 2)
    assert (both[:, 0] == to_directed).all()  # the first is the one that stands for both
    one, two = bonds[both[:, 0]], bonds[both[:, 1]]
    assert (one[:, :2] == two[:, :2].flip(1)).all() and (one[:, 2:] == -two[:, 2:]).all()
    angles = graph.bond_graph.long()
    assert (to_undirected[angles[:, 2]] == angles[:, 1]).all()
    assert (to_undirected[angles[:, 4]] == angles[:, 3]).all()
    assert (bonds[angles[:, 2], 0] == angles[:, 0]).all() and (bonds[angles[:, 4], 0] == angles[:, 0]).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_graph_and_predictions(model, name):
    structure = structure_of(SYSTEMS[name])
    own, ours = model.graph_converter(structure, "id", "mp"), GraphConverter()(structure, "id", "mp")
    assert_same_graph(ours, own)
    assert_consistent(ours)
    for key, value in own.to_dict().items():
        mine = ours.to_dict()[key]
        if not isinstance(value, torch.Tensor):
            assert mine == value and type(mine) is type(value), key
            continue
        assert mine.dtype == value.dtype and mine.requires_grad == value.requires_grad, key
        assert mine.shape == value.shape or value.numel() == mine.numel() == 0, key
    assert torch.equal(ours.atom_frac_coord, own.atom_frac_coord) and torch.equal(ours.lattice, own.lattice)
    assert torch.equal(ours.atomic_number, own.atomic_number)

    found = differences(model.predict_graph(ours), model.predict_graph(own))
    for quantity, value in found.items():
        largest[quantity] = max(largest[quantity], value)
        assert value <= BOUNDS[quantity], (quantity, value)


@pytest.mark.parametrize("algorithm", ["fast", "legacy"])
@pytest.mark.parametrize("name", ["silicon_sheared", "slab_with_oxygen", "copper_one_atom"])
def test_order_is_that_of_its_own_code(monkeypatch, name, algorithm):
    """CHGNet's own code, given our bonds in our order, numbers everything as we do."""
    structure = structure_of(SYSTEMS[name])
    ours = GraphConverter()(structure)
    positions, lattice = structure.cart_coords, structure.lattice.matrix
    i, j = ours.atom_graph.numpy().astype(np.int64).T
    vectors = positions[j] - positions[i] + ours.neighbor_image.numpy() @ lattice
    found = i, j, ours.neighbor_image.numpy(), np.linalg.norm(vectors, axis=1)
    monkeypatch.setattr(type(structure), "get_neighbor_list", lambda *_, **__: found)
    own = CrystalGraphConverter(algorithm=algorithm)(structure)
    for key in ("atom_graph", "directed2undirected", "undirected2directed", "neighbor_image"):
        assert torch.equal(getattr(ours, key), getattr(own, key)), key
    assert torch.equal(ours.bond_graph[:, :3], own.bond_graph[:, :3])  # centers and first bonds
    np.testing.assert_array_equal(rows(ours.bond_graph.numpy()), rows(own.bond_graph.numpy()))


def test_other_orders_of_its_own_list(model, monkeypatch):
    """Its own list in another order changes its numbers as much as ours does: the bounds are its noise."""
    structure = structure_of(SYSTEMS["oxide_anywhere"])
    reference = model.predict_structure(structure)
    found = structure.get_neighbor_list(r=6, numerical_tol=1e-8)
    noise = dict.fromkeys(BOUNDS, 0.0)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(found[0]))
        shuffled = tuple(array[order] for array in found)
        monkeypatch.setattr(type(structure), "get_neighbor_list", lambda *_, _s=shuffled, **__: _s)
        for quantity, value in differences(model.predict_structure(structure), reference).items():
            noise[quantity] = max(noise[quantity], value)
    assert all(noise[quantity] <= bound for quantity, bound in BOUNDS.items()), noise
    assert (
        noise["forces (eV/Å)"] > 1e-7 and noise["stress (GPa)"] > 1e-6
    )  # it is not deterministic in the order


@pytest.mark.parametrize("cutoffs", [(2.0, 1.5), (4.0, 4.0), (6.0, 3.0), (9.0, None)])
def test_random_box(cutoffs):
    atoms = random_box(20)
    options = {
        "atom_graph_cutoff": cutoffs[0],
        "bond_graph_cutoff": cutoffs[1],
        "on_isolated_atoms": "ignore",
    }
    if cutoffs[1] is None:  # all bonds make angles: fewer atoms
        atoms, options["atom_graph_cutoff"] = random_box(4), 5.0
    structure = structure_of(atoms)
    ours, own = GraphConverter(**options)(structure), CrystalGraphConverter(**options)(structure)
    assert len(ours.bond_graph) and ours.bond_graph_cutoff == own.bond_graph_cutoff
    assert_same_graph(ours, own)
    assert_consistent(ours)


@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False), (True, True, True)])
def test_open_axes(model, pbc):
    slab = SYSTEMS["slab_with_oxygen"].copy()
    slab.pbc = pbc
    assert_same_graph(GraphConverter()(structure_of(slab)), model.graph_converter(structure_of(slab)))


@pytest.mark.parametrize("origin", [(0, 0, 0), (0.1, 0.2, 0.3), (7.3, -11.1, 2.2)])
@pytest.mark.parametrize("edge", [3.0, 6 / 5**0.5, 6.0 + 5e-10])
def test_shell_on_the_cutoff(model, edge, origin):
    """It is in, up to 1e-8 Å² beyond; and it does not matter: the weights of its bonds are zero there."""
    atoms = bulk("Fe", "sc", a=edge) * (1 if edge > 5 else 2)
    atoms.positions += origin
    structure = structure_of(atoms)
    ours, own = GraphConverter()(structure), model.graph_converter(structure)
    np.testing.assert_array_equal(bonds_and_angles(ours)[0], bonds_and_angles(own)[0])
    inside = GraphConverter(atom_graph_cutoff=6 - 1e-6, on_isolated_atoms="ignore")(structure)
    assert len(inside.atom_graph) < len(ours.atom_graph)
    for graph in (inside, own):
        found = differences(model.predict_graph(ours), model.predict_graph(graph))
        assert all(found[quantity] <= bound for quantity, bound in BOUNDS.items()), found


@pytest.mark.parametrize("converter", [GraphConverter(), CrystalGraphConverter()])
def test_shell_beyond_the_tolerance(converter):
    with pytest.raises(ValueError, match="1 isolated"):
        converter(structure_of(bulk("Fe", "sc", a=6.0 + 1.5e-9)))


def test_bond_on_the_angle_cutoff(model):
    """Rounding decides which angles CHGNet's own graph has, the energy does not depend on it."""
    counts, energies = set(), []
    for origin in ((0, 0, 0), (0.1, 0.2, 0.3), (7.3, -11.1, 2.2)):
        atoms = bulk("Fe", "sc", a=3.0) * 2
        atoms.positions += origin
        for converter in (
            model.graph_converter,
            GraphConverter(),
            GraphConverter(bond_graph_cutoff=3 + 1e-6),
        ):
            graph = converter(structure_of(atoms))
            if converter is model.graph_converter:
                counts.add(len(graph.bond_graph))
            energies.append(1e3 * float(model.predict_graph(graph, task="e")["e"]))
    assert len(counts) > 1
    assert np.ptp(energies) <= BOUNDS["energy (meV/atom)"]


@pytest.mark.parametrize("name", ["atom_graph_cutoff", "bond_graph_cutoff"])
def test_a_negative_cutoff_is_an_error_though_its_square_is_used(name):
    converter = GraphConverter(on_isolated_atoms="ignore")
    setattr(converter, name, -3.0)
    with pytest.raises(ValueError, match=f"`{name}` must be finite and > 0; got -3.0"):
        converter(structure_of(CRYSTALS["salt"]))
    with pytest.raises(ValueError, match="`on_isolated_atoms` must be"):
        converter.set_isolated_atom_response("eror")


def test_a_response_to_isolated_atoms_that_is_assigned_is_checked_too():
    """It was only looked at where there are some, and a typing error was none."""
    converter = GraphConverter()
    converter.on_isolated_atoms = "rais"
    for structure in (structure_of(CRYSTALS["salt"]), far_apart()):
        with pytest.raises(
            ValueError, match="`on_isolated_atoms` must be 'ignore', 'warn' or 'error'; got 'rais'"
        ):
            converter(structure)


def far_apart(edge: float = 20.0):
    return structure_of(Atoms("He2", [[0, 0, 0], [10, 10, 10]], cell=edge * np.eye(3), pbc=True))


def test_isolated_atoms(model, capsys):
    own, ours = CrystalGraphConverter(), GraphConverter()
    for converter in (own, ours):
        with pytest.raises(ValueError, match=r"graph_id='x' has 2 isolated atom\(s\)"):
            converter(far_apart(), graph_id="x")
        converter.set_isolated_atom_response("warn")
        converter(far_apart(), graph_id="x")
        assert "has 2 isolated atom(s)" in capsys.readouterr().err
        converter.set_isolated_atom_response("ignore")
    one, two = ours(far_apart()), own(far_apart())
    assert capsys.readouterr().err == ""
    assert one.atom_graph.shape == (0, 2) and one.bond_graph.shape == (0, 5)
    assert one.atom_graph.dtype == two.atom_graph.dtype and one.bond_graph.dtype == two.bond_graph.dtype
    assert max(differences(model.predict_graph(one), model.predict_graph(two)).values()) == 0
    # One of three alone: the others have their bond.
    atoms = Atoms("He3", [[0, 0, 0], [1.5, 0, 0], [10, 10, 10]], cell=20 * np.eye(3), pbc=True)
    with pytest.raises(ValueError, match="has 1 isolated"):
        GraphConverter()(structure_of(atoms))


def test_use_diffnl_keeps_the_options():
    model = CHGNet(atom_graph_cutoff=5.0, bond_graph_cutoff=2.5)
    model.graph_converter.set_isolated_atom_response("ignore")
    assert use_diffnl(model) is model
    ours = model.graph_converter
    assert isinstance(ours, GraphConverter) and ours.on_isolated_atoms == "ignore"
    assert (ours.atom_graph_cutoff, ours.bond_graph_cutoff) == (5.0, 2.5)
    for other in (GraphConverter.from_dict(ours.as_dict()), pickle.loads(pickle.dumps(ours))):
        assert other.as_dict() == ours.as_dict() and not list(other.parameters())
    assert set(ours.as_dict()) == set(CrystalGraphConverter().as_dict())


def energy_by(model: CHGNet):
    """The energy of atoms, eV."""
    return lambda atoms: len(atoms) * float(model.predict_structure(structure_of(atoms), task="e")["e"])


@pytest.mark.parametrize("name", ["perovskite_sheared", "silicon_sheared", "oxide_anywhere"])
def test_calculator_and_signs_of_the_stress(model, name):
    """Positive under tension, from the calculator in eV/Å³ and from the model in GPa, (3, 3) both."""
    atoms = SYSTEMS[name]
    own = CHGNetCalculator(copy.deepcopy(model), use_device="cpu")
    ours = CHGNetCalculator(use_diffnl(copy.deepcopy(model)), use_device="cpu")
    assert isinstance(ours.model.graph_converter, GraphConverter)
    for calculator in (own, ours):
        calculator.calculate(atoms)
    assert abs(ours.results["energy"] - own.results["energy"]) / len(atoms) <= 4e-6
    np.testing.assert_allclose(ours.results["forces"], own.results["forces"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours.results["stress"], own.results["stress"], atol=1e-3 * units.GPa, rtol=0)

    stress = ours.results["stress"]
    expected = numerical_stress(energy_by(ours.model), atoms)
    assert np.abs(expected).max() > 5e-3  # so that a sign is one
    np.testing.assert_allclose(stress, expected, atol=0.01 * np.abs(expected).max())
    raw = ours.model.predict_structure(structure_of(atoms))["s"]
    np.testing.assert_allclose(raw, to_gpa(torch.tensor(expected)), atol=0.01 * np.abs(expected).max() * GPA)


def test_stress_of_a_left_handed_cell(model):
    """CHGNet divides by the signed volume: with its own list as with ours the sign is the opposite."""
    atoms = strained(SYSTEMS["iron_left_handed"], 0.03 * np.eye(3))
    assert np.linalg.det(atoms.cell.array) < 0
    for each in (copy.deepcopy(model), use_diffnl(copy.deepcopy(model))):
        calculator = CHGNetCalculator(each, use_device="cpu")
        expected = numerical_stress(energy_by(each), atoms)
        calculator.calculate(atoms)
        np.testing.assert_allclose(
            calculator.results["stress"], -expected, atol=0.02 * np.abs(expected).max()
        )


def test_batches(model):
    structures = [structure_of(SYSTEMS[name]) for name in ("silicon", "slab_with_oxygen", "magnesium")]
    ours = use_diffnl(copy.deepcopy(model))
    together = ours.predict_structure(structures)
    for one, structure in zip(together, structures, strict=True):
        found = differences(one, model.predict_structure(structure))
        assert all(found[quantity] <= bound for quantity, bound in BOUNDS.items()), found


def test_training_gradients(model):
    """The gradients of a loss on forces and stress are those with its own graph."""
    structure = structure_of(SYSTEMS["perovskite_sheared"])
    gradients = []
    for each in (copy.deepcopy(model), use_diffnl(copy.deepcopy(model))):
        out = each([each.graph_converter(structure)], task="efs")
        (out["e"].sum() + out["f"][0].square().sum() + out["s"][0].square().sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    own, ours = gradients
    assert own.norm() > 1 and (ours - own).norm() <= 1e-4 * own.norm()


def test_relaxation(model):
    """Five steps of CHGNet's own optimizer, cell included, end in the same place."""
    ends = []
    for each in (copy.deepcopy(model), use_diffnl(copy.deepcopy(model))):
        result = StructOptimizer(each, use_device="cpu").relax(
            structure_of(SYSTEMS["perovskite_stretched"]), steps=5, verbose=False
        )
        ends.append(result["final_structure"])
    np.testing.assert_allclose(ends[1].cart_coords, ends[0].cart_coords, atol=1e-4)
    np.testing.assert_allclose(ends[1].lattice.matrix, ends[0].lattice.matrix, atol=1e-4)


def test_recipe():
    names = run_recipe("CHGNet")
    own = CHGNet.load(use_device="cpu", verbose=False)
    calculator = CHGNetCalculator(own, use_device="cpu")
    atoms = names["atoms"]
    assert abs(calculator.get_potential_energy(atoms) - names["energy"]) <= 4e-6 * len(atoms)
    assert names["stress"].shape == (6,)
