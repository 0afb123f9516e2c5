"""SevenNet with its trained weights: our edges against its own, and what the model makes of both."""

import copy
import socket

import numpy as np
import pytest
import sevenn._keys as KEY
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.spacegroup import crystal
from recipes import run_recipe
from sevenn.atom_graph_data import AtomGraphData
from sevenn.calculator import SevenNetCalculator
from sevenn.train import dataload
from stresses import numerical_stress
from structures import CRYSTALS, OPEN, SHEAR, SLABS, STRUCTURES, canonical, random_box, rattled, strained

import diffnl
from diffnl.adapters.sevennet import graph, graph_build, use_diffnl
from diffnl.stress import GPA, from_vasp, to_voigt

ADAPTER = "SevenNet"
PACKAGES = ("sevenn", "matscipy")

SITES = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
PEROVSKITE = crystal(["Sr", "Ti", "O"], SITES, spacegroup=221, cellpar=[3.905] * 3 + [90] * 3)
PEROVSKITES = {
    "perovskite": rattled(PEROVSKITE),
    "perovskite_perfect": PEROVSKITE,
    "perovskite_sheared": strained(rattled(PEROVSKITE), SHEAR),
    "perovskite_stretched": strained(rattled(PEROVSKITE * (2, 1, 1)), 0.03 * np.eye(3)),
}
BOUNDS = {"energy (meV/atom)": 4e-3, "forces (eV/Å)": 1e-5, "stress (GPa)": 1e-4}  # float32 sums
largest = dict.fromkeys(BOUNDS, 0.0)
OWN = dataload._graph_build_f


@pytest.fixture(scope="module")
def calculator():
    """The weights of the wheel; no connection is made for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the weights are not in the wheel"))
        return SevenNetCalculator("7net-0", device="cpu")


@pytest.fixture(autouse=True)
def its_own_list_again():
    yield
    dataload._graph_build_f = OWN


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nSevenNet, largest difference to its own list:", *(f"{k} {v:.2g}" for k, v in largest.items()))


def results(calculator, atoms: Atoms, build) -> dict:
    dataload._graph_build_f = build
    calculator.calculate(atoms)
    return dict(calculator.results)


def differences(one: dict, two: dict) -> dict[str, float]:
    apart = {key: np.abs(np.asarray(one[key]) - two[key]).max() for key in ("energy", "forces", "stress")}
    per_atom = 1e3 * apart["energy"] / len(one["forces"])
    return dict(zip(BOUNDS, (per_atom, apart["forces"], apart["stress"] / units.GPa), strict=True))


def edges(build, atoms: Atoms, cutoff: float):
    i, j, vectors, shifts = build(cutoff, atoms.pbc, atoms.cell.array.copy(), atoms.positions)
    return canonical(i, j, shifts, vectors)


@pytest.mark.parametrize("build", [dataload._graph_build_matscipy, dataload._graph_build_ase])
@pytest.mark.parametrize("cutoff", [3.0, 5.0, 9.0])
@pytest.mark.parametrize("name", STRUCTURES | PEROVSKITES)
def test_edges(name, cutoff, build):
    atoms = (STRUCTURES | PEROVSKITES)[name]
    *ours, vectors = edges(graph_build, atoms, cutoff)
    *own, their_vectors = edges(build, atoms, cutoff)
    for one, two in zip(ours, own, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(vectors, their_vectors, atol=1e-12)


def test_what_comes_back():
    atoms = SLABS["slab_with_oxygen"]
    cell = atoms.cell.array.copy()
    ours = graph_build(5.0, atoms.pbc, cell, atoms.positions)
    np.testing.assert_array_equal(cell, atoms.cell.array)
    own = dataload._graph_build_matscipy(5.0, atoms.pbc, cell, atoms.positions)
    assert (cell != atoms.cell.array).any()  # SevenNet's changes its argument
    assert type(ours) is type(own) is tuple
    for one, two in zip(ours, own, strict=True):
        assert (one.dtype, one.shape, one.flags.writeable) == (two.dtype, two.shape, two.flags.writeable)
    assert (np.diff(ours[0]) >= 0).all() and (np.diff(own[0]) >= 0).all()


@pytest.mark.parametrize("cutoff", [1.0, 6.0, 15.0])
def test_random_box(cutoff):
    for one, two in zip(
        edges(graph_build, random_box(), cutoff), edges(OWN, random_box(), cutoff), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-12)


def test_open_axis_along_another_lattice_vector():
    """SevenNet overwrites an open axis with x, y or z, which may be a lattice vector already."""
    slab = SLABS["slab_with_oxygen"]
    turned = Atoms(slab.numbers, slab.positions, cell=slab.cell.array[[2, 0, 1]], pbc=[False, True, True])
    with pytest.raises(np.linalg.LinAlgError, match="Singular"):
        edges(dataload._graph_build_matscipy, turned, 5.0)
    ours, own = edges(graph_build, turned, 5.0), edges(dataload._graph_build_ase, turned, 5.0)
    for one, two in zip(ours, own, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-12)


def assert_same_data(ours: dict, own: dict, atoms: Atoms) -> None:
    assert list(ours) == list(own)
    for key, value in own.items():
        if not isinstance(value, np.ndarray):
            assert ours[key] == value, key
            continue
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        if key == KEY.CELL:  # SevenNet's has rows of its own on open axes
            np.testing.assert_array_equal(ours[key], atoms.cell.array)
            np.testing.assert_array_equal(ours[key][atoms.pbc], value[atoms.pbc])
        elif key not in (KEY.EDGE_IDX, KEY.EDGE_VEC, KEY.CELL_SHIFT):
            np.testing.assert_array_equal(ours[key], value)
    if KEY.CELL_SHIFT in own:
        one, two = (canonical(*d[KEY.EDGE_IDX], d[KEY.CELL_SHIFT], d[KEY.EDGE_VEC]) for d in (ours, own))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("name", ["silicon_sheared", "slab_with_oxygen", "ethanol", "wire", "one_atom"])
def test_graphs_from_atoms(name, with_shift):
    atoms = STRUCTURES[name].copy()
    rng = np.random.default_rng(0)
    labels = {"energy": -1.5, "forces": rng.random((len(atoms), 3)), "stress": rng.random(6)}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info = {"source": "a test"}

    def graphs():
        yield dataload.unlabeled_atoms_to_graph(atoms, 5.0, with_shift)
        yield dataload.atoms_to_graph(atoms, 5.0, y_from_calc=True, with_shift=with_shift)

    own = list(graphs())
    assert use_diffnl() is OWN and dataload._graph_build_f is graph_build
    for ours, theirs in zip(graphs(), own, strict=True):
        assert_same_data(ours, theirs, atoms)
    (built,) = dataload.graph_build([atoms], 5.0, y_from_calc=True)
    assert built[KEY.EDGE_VEC].dtype == torch.float32 and built[KEY.EDGE_IDX].dtype == torch.int64
    assert built[KEY.EDGE_IDX].shape == (2, own[0][KEY.EDGE_IDX].shape[1])


@pytest.mark.parametrize("name", CRYSTALS | SLABS | PEROVSKITES | OPEN)
def test_predictions(calculator, name):
    atoms = (STRUCTURES | PEROVSKITES)[name]
    own, ours = results(calculator, atoms, OWN), results(calculator, atoms, graph_build)
    assert ours["num_edges"] == own["num_edges"]
    for key, value in own.items():
        assert type(ours[key]) is type(value) and np.shape(ours[key]) == np.shape(value), key
    found = differences(ours, own)
    if not atoms.pbc.all() and name in OPEN:
        found["stress (GPa)"] = 0.0  # divided by no volume
    for quantity, value in found.items():
        largest[quantity] = max(largest[quantity], value)
        assert value <= BOUNDS[quantity], (quantity, value)


@pytest.mark.parametrize("origin", [(0, 0, 0), (0.1, 0.2, 0.3), (7.3, -11.1, 2.2)])
@pytest.mark.parametrize("edge", [2.5, 5 / 3**0.5, 5 / 5**0.5, 5.0])
def test_shell_on_the_cutoff(calculator, edge, origin):
    """Strictly shorter: rounding may differ, but only there, where an edge weighs nothing."""
    atoms = bulk("Fe", "sc", a=edge) * (1 if edge > 4 else 2)
    atoms.positions += origin
    found = [edges(build, atoms, 5.0) for build in (OWN, graph_build)]
    own, ours = ({(a, b, *s): v for a, b, s, v in zip(i, j, S, V, strict=True)} for i, j, S, V in found)
    for edge_of_one in set(own) ^ set(ours):
        assert abs(np.linalg.norm((own | ours)[edge_of_one]) - 5.0) < 1e-14
    assert all((j, i, -a, -b, -c) in ours for i, j, a, b, c in ours)

    def larger(cutoff, *rest):
        return graph_build(cutoff + 1e-6, *rest)

    assert len(larger(5.0, atoms.pbc, atoms.cell.array, atoms.positions)[0]) > min(len(own), len(ours))
    one = results(calculator, atoms, graph_build)
    for build in (OWN, larger):
        apart = differences(one, results(calculator, atoms, build))
        assert all(apart[quantity] <= bound for quantity, bound in BOUNDS.items()), apart


@pytest.mark.parametrize(
    "name", ["perovskite_sheared", "silicon_sheared", "oxide_anywhere", "iron_left_handed"]
)
def test_signs_of_the_stress(calculator, name):
    """The calculator's is ASE's; the model's is VASP's: negative, xx yy zz xy yz zx, but in eV/Å³."""
    atoms = (STRUCTURES | PEROVSKITES)[name]
    if name == "iron_left_handed":
        atoms = strained(atoms, 0.03 * np.eye(3))
    use_diffnl()
    expected = torch.tensor(numerical_stress(calculator.get_potential_energy, atoms))
    scale = float(expected.abs().max())
    assert scale > 5e-3  # so that a sign is one
    calculator.calculate(atoms)
    np.testing.assert_allclose(calculator.results["stress"], to_voigt(expected), atol=0.02 * scale)
    data = AtomGraphData.from_numpy_dict(dataload.unlabeled_atoms_to_graph(atoms, calculator.cutoff))
    raw = calculator.model(data)[KEY.PRED_STRESS].detach().double()
    np.testing.assert_allclose(from_vasp(10 * GPA * raw), expected, atol=0.02 * scale)


def tensors(atoms: Atoms, dtype=torch.float64):
    """positions, cell, pbc and numbers."""
    positions = torch.tensor(atoms.positions, dtype=dtype, requires_grad=True)
    cell = torch.tensor(atoms.cell.array, dtype=dtype, requires_grad=True)
    return positions, cell, torch.tensor(atoms.pbc), torch.tensor(atoms.numbers)


@pytest.fixture(scope="module")
def energies(calculator):
    """The model without its own derivatives."""
    model = copy.deepcopy(calculator.model)
    model.delete_module_by_key("force_output")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["perovskite_sheared", "slab_with_oxygen", "oxide_anywhere"])
def test_derivatives_through_the_list(calculator, energies, name, dtype):
    """Forces and stress are those of the calculator, in its sign, without a stress module in the model."""
    atoms = (STRUCTURES | PEROVSKITES)[name]
    positions, cell, pbc, numbers = tensors(atoms, dtype)
    data = graph(positions, cell, pbc, numbers, calculator.cutoff)
    assert data[KEY.EDGE_VEC].dtype == torch.float32
    energy = energies(data)[KEY.PRED_TOTAL_ENERGY].squeeze()
    forces, stress = diffnl.forces_and_stress(energy, positions, cell)
    ours = {"energy": energy.item(), "forces": forces.numpy(), "stress": to_voigt(stress).numpy()}
    apart = differences(ours, results(calculator, atoms, OWN))
    # Positions far from the box lose digits in float32, here and in the sum over r (x) dE/dr.
    wide = 10 if dtype == torch.float32 else 1
    assert all(apart[quantity] <= wide * bound for quantity, bound in BOUNDS.items()), apart


def test_data_is_that_of_atoms():
    """The tensors are those of SevenNet's own way, NumPy and all."""
    atoms = CRYSTALS["silicon_sheared"]
    own = AtomGraphData.from_numpy_dict(dataload.unlabeled_atoms_to_graph(atoms, 5.0, with_shift=True))
    ours = graph(*tensors(atoms), 5.0)
    assert set(ours.keys()) == set(own.keys())
    for key, value in own:
        if not isinstance(value, torch.Tensor):
            assert ours[key] == value, key
            continue
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        if key not in (KEY.EDGE_IDX, KEY.EDGE_VEC, KEY.CELL_SHIFT):
            torch.testing.assert_close(ours[key].detach(), value)
    found = [canonical(*d[KEY.EDGE_IDX], d[KEY.CELL_SHIFT], d[KEY.EDGE_VEC].detach()) for d in (ours, own)]
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize(
    "around",
    [lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["device", "autocast"],
)
def test_the_graph_is_the_same_bits_whatever_is_around(around):
    given = tensors(CRYSTALS["silicon_sheared"], torch.float32)
    expected = graph(*given, 5.0)
    with around():
        found = graph(*given, 5.0)
    for key, value in expected:
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["silicon_sheared", "ethanol"])
def test_neither_graph_nor_model_writes_to_the_tensors_given(calculator, name):
    """float32 as the model, so that nothing is copied on the way; SevenNet raises volumes of 0 in place."""
    positions, cell, pbc, numbers = given = tensors(STRUCTURES[name], torch.float32)
    before = [t.detach().clone() for t in given]
    copy.deepcopy(calculator.model)(graph(positions, cell, pbc, numbers, calculator.cutoff))
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)


def test_batches(calculator, energies):
    """Three systems, one of them a slab, in one call, atoms not in order; the model's own forces too."""
    parts = [STRUCTURES[name] for name in ("silicon_sheared", "slab_with_oxygen", "gallium_nitride")]
    system_idx = torch.cat([torch.full((len(atoms),), k) for k, atoms in enumerate(parts)])
    order = torch.randperm(len(system_idx), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.tensor(atoms.positions) for atoms in parts])[order].requires_grad_()
    cell = torch.stack([torch.tensor(atoms.cell.array) for atoms in parts]).requires_grad_()
    pbc = torch.stack([torch.tensor(atoms.pbc) for atoms in parts])
    numbers = torch.cat([torch.tensor(atoms.numbers) for atoms in parts])[order]
    system_idx = system_idx[order]

    model, whole = copy.deepcopy(energies), copy.deepcopy(calculator.model)
    for each in (model, whole):
        each.set_is_batch_data(True)
    where = positions, cell, pbc, numbers, calculator.cutoff, system_idx
    energy = model(graph(*where))[KEY.PRED_TOTAL_ENERGY]
    forces, stress = diffnl.forces_and_stress(energy, positions, cell, system_idx)
    out = whole(graph(*where))
    for k, atoms in enumerate(parts):
        own = results(calculator, atoms, OWN)
        back = order[system_idx == k].argsort()  # the atoms of one system, in their order
        ours = {
            "energy": energy[k].item(),
            "forces": forces[system_idx == k][back].numpy(),
            "stress": to_voigt(stress[k]).numpy(),
        }
        modules = {
            "energy": out[KEY.PRED_TOTAL_ENERGY][k].item(),
            "forces": out[KEY.PRED_FORCE][system_idx == k][back].detach().numpy(),
            "stress": to_voigt(from_vasp(10 * GPA * out[KEY.PRED_STRESS][k].detach())).numpy(),
        }
        for found in (ours, modules):
            apart = differences(found, own)
            assert all(apart[quantity] <= bound for quantity, bound in BOUNDS.items()), apart


def test_a_batch_of_one_without_system_idx(calculator, energies):
    model = copy.deepcopy(energies)
    model.set_is_batch_data(True)
    positions, cell, pbc, numbers = tensors(CRYSTALS["silicon"])
    data = graph(positions, cell[None], pbc, numbers, calculator.cutoff)
    assert data[KEY.BATCH].tolist() == [0, 0] and data[KEY.NUM_ATOMS].tolist() == [2]
    one = model(data)[KEY.PRED_TOTAL_ENERGY].item()
    assert abs(one - results(calculator, CRYSTALS["silicon"], OWN)["energy"]) < 1e-5


def test_second_derivatives(calculator, energies):
    """A Hessian and a strain derivative of forces, against differences of first derivatives, in float64."""
    model = copy.deepcopy(energies).double()

    def in_float64(_, inputs, out):  # SevenNet makes its one-hot vectors float32
        out[KEY.NODE_FEATURE], out[KEY.NODE_ATTR] = (
            out[KEY.NODE_FEATURE].double(),
            out[KEY.NODE_ATTR].double(),
        )
        return out

    model.onehot_idx_to_onehot.register_forward_hook(in_float64)
    positions, cell, pbc, numbers = tensors(PEROVSKITES["perovskite_sheared"])

    def energy(r, h):
        data = graph(r, h, pbc, numbers, calculator.cutoff, dtype=torch.float64)
        return model(data)[KEY.PRED_TOTAL_ENERGY].squeeze()

    def gradients(r, h, create_graph=False):
        return torch.autograd.grad(energy(r, h), (r, h), create_graph=create_graph)

    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (positions, cell)]
    first = gradients(positions, cell, create_graph=True)
    second = torch.autograd.grad(first, (positions, cell), along)
    step = 1e-4
    ends = []
    for sign in (1, -1):
        moved = [
            (x.detach() + sign * step * a).requires_grad_()
            for x, a in zip((positions, cell), along, strict=True)
        ]
        ends.append(gradients(*moved))
    for exact, plus, minus in zip(second, *ends, strict=True):
        assert exact.norm() > 1
        torch.testing.assert_close(
            exact, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-5 * float(exact.norm())
        )


def test_training_gradients(calculator):
    """The gradients of a loss on forces and stress, by SevenNet's modules, are those of its own list."""
    atoms = PEROVSKITES["perovskite_sheared"]
    found = []
    for build in (OWN, graph_build):
        dataload._graph_build_f = build
        model = copy.deepcopy(calculator.model).train()
        out = model(
            AtomGraphData.from_numpy_dict(dataload.unlabeled_atoms_to_graph(atoms, calculator.cutoff))
        )
        stress = out[KEY.PRED_STRESS] * GPA
        (out[KEY.PRED_FORCE].square().sum() + stress.square().sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    own, ours = found
    assert own.norm() > 1 and (ours - own).norm() <= 1e-4 * own.norm()


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan")])
def test_bad_cutoff(cutoff):
    with pytest.raises(ValueError, match="`cutoff`"):
        graph_build(cutoff, [True] * 3, np.eye(3), np.zeros((1, 3)))


def test_atomic_numbers_that_are_no_integers():
    """Their decimals would be cut off."""
    cell = 9.0 * torch.eye(3)
    with pytest.raises(TypeError, match="`atomic_numbers` must have an integer dtype; got torch.float32"):
        graph(torch.zeros(1, 3), cell, True, torch.tensor([6.5]), 4.0)


def test_recipe(calculator):
    names = run_recipe("SevenNet")
    assert dataload._graph_build_f is graph_build
    own = results(calculator, names["atoms"], OWN)
    ours = {"energy": names["energy"], "forces": names["forces"], "stress": names["stress"]}
    apart = differences(ours, own)
    assert all(apart[quantity] <= bound for quantity, bound in BOUNDS.items()), apart
