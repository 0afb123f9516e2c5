import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.graph import compute
from fairchem.core.graph import radius_graph_pbc as theirs
from fairchem.core.models.uma.escn_md import MLP_EFS_Head, eSCNMDBackbone
from recipes import run_recipe
from structures import STRUCTURES, canonical, random_box

from diffnl.adapters import fairchem as ours

ADAPTER = "fairchem"
PACKAGES = ("fairchem-core",)

# fairchem's data take no cell without volume on a periodic axis: a wire gets one.
WIRE = Atoms("Au2", [[0, 0, 0], [0.3, 0.2, 1.4]], cell=[9, 9, 2.9], pbc=[False, False, True])
SYSTEMS = {**STRUCTURES, "wire": WIRE, "random_box": random_box()}
ALL = 10_000  # neighbours: no limit
VERSIONS = {
    1: (ours.radius_graph_pbc, theirs.radius_graph_pbc),
    2: (ours.radius_graph_pbc_v2, theirs.radius_graph_pbc_v2),
}


def data_of(*systems: Atoms, dtype=torch.float64):
    """A batch; `from_ase` wraps atoms into the cell, which fairchem's lists need."""
    return atomicdata_list_to_batch(
        [AtomicData.from_ase(atoms, task_name="omat", target_dtype=dtype) for atoms in systems]
    )


def rows(graph):
    edge_index, cell_offsets, neighbors = graph
    j, i = edge_index
    return *canonical(i, j, cell_offsets), neighbors.numpy()


def assert_same(ours, theirs):
    for x, y in zip(rows(ours), rows(theirs), strict=True):
        np.testing.assert_array_equal(x, y)


def distances_by_center(data, graph):
    distances = compute.get_pbc_distances(data.pos, graph[0], data.cell, *graph[1:])["distances"].numpy()
    center = graph[0][1].numpy()
    order = np.lexsort((distances, center))
    return center[order], distances[order]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cutoff", [2.9, 6.1])
@pytest.mark.parametrize("name", SYSTEMS)
def test_same_edges(name, cutoff, version):
    mine, other = VERSIONS[version]
    data = data_of(SYSTEMS[name])
    assert_same(mine(data, cutoff, ALL), other(data, cutoff, ALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes_and_order(version, dtype):
    mine, other = VERSIONS[version]
    data = data_of(SYSTEMS["random_box"], SYSTEMS["silicon"], dtype=dtype)
    found, expected = mine(data, 5.0, ALL), other(data, 5.0, ALL)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.device == y.device
    if version == 1:  # the second sorts by a grid
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_batch(version):
    mine, other = VERSIONS[version]
    data = data_of(*(SYSTEMS[name] for name in ("salt", "copper_one_atom", "random_box", "silicon_sheared")))
    assert_same(mine(data, 5.0, ALL), other(data, 5.0, ALL))
    alone = copy.copy(data)
    alone.batch = None
    assert_same(mine(alone, 5.0, ALL), mine(data, 5.0, ALL))


def test_mixed_periodicity():
    data = data_of(SYSTEMS["salt"], SYSTEMS["ethanol"], SYSTEMS["graphene"])
    expected = theirs.radius_graph_pbc_v2(data, 5.0, ALL)
    assert_same(ours.radius_graph_pbc_v2(data, 5.0, ALL), expected)
    assert_same(ours.radius_graph_pbc(data, 5.0, ALL), expected)
    with pytest.raises(RuntimeError, match="mixed PBC"):
        theirs.radius_graph_pbc(data, 5.0, ALL)


@pytest.mark.parametrize("strictly", [False, True])
@pytest.mark.parametrize("most", [1, 5, 20, 60])
@pytest.mark.parametrize("version", VERSIONS)
def test_nearest_neighbors(version, most, strictly):
    mine, other = VERSIONS[version]
    data = data_of(SYSTEMS["random_box"], SYSTEMS["silicon"], SYSTEMS["one_atom"].copy())
    data.pbc[2] = True  # one atom in a box: images only
    data.cell[2] *= 4.0
    found, expected = mine(data, 6.1, most, strictly), other(data, 6.1, most, strictly)
    if strictly:  # of S and -S, at one distance, fairchem keeps any
        for x, y in zip(distances_by_center(data, found), distances_by_center(data, expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
        assert found[2].tolist() == expected[2].tolist()
    else:
        assert_same(found, expected)
    assert found[0].shape[1] < mine(data, 6.1, ALL)[0].shape[1]


def test_shells_stay_whole():
    """A perfect crystal: 12 neighbours at one distance, 6 more in the next shell."""
    data = data_of(bulk("Cu"))
    for most, expected in ((5, 12), (12, 18)):
        found = ours.radius_graph_pbc(data, 3.7, most)
        assert found[2].tolist() == [expected]
        assert_same(found, theirs.radius_graph_pbc(data, 3.7, most))
    assert ours.radius_graph_pbc(data, 3.7, 5, True)[2].tolist() == [5]
    assert ours.radius_graph_pbc(data, 3.7, 0)[2].tolist() == [18]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [2.0, 0.7, 3.3, 6.1])
def test_the_radius_itself_is_within(radius, dtype):
    positions = torch.tensor([[0.0, 0, 0], [radius, 0, 0]], dtype=torch.float64)
    data = data_of(Atoms("H2", positions.numpy()), dtype=dtype)
    assert ours.radius_graph_pbc(data, radius, ALL)[2].tolist() == [2]
    assert theirs.radius_graph_pbc(data, radius, ALL)[2].tolist() == [2]
    beyond = torch.nextafter(data.pos[1, 0], torch.tensor(9.0, dtype=dtype))
    data.pos[1, 0] = torch.nextafter(beyond, torch.tensor(9.0, dtype=dtype))
    assert ours.radius_graph_pbc(data, radius, ALL)[2].tolist() == [0]


def test_atoms_too_near_are_no_edge():
    data = data_of(Atoms("H3", [[0, 0, 0], [0.005, 0, 0], [0.005, 0, 0]]))
    for mine, other in VERSIONS.values():
        assert_same(mine(data, 3.0, ALL), other(data, 3.0, ALL))
    assert ours.radius_graph_pbc(data, 3.0, ALL)[2].tolist() == [0]
    assert ours.radius_graph_pbc_v2(data, 3.0, ALL)[2].tolist() == [4]


def test_other_pbc_than_that_of_the_data():
    data = data_of(SYSTEMS["salt"], SYSTEMS["silicon"])
    for pbc in (
        torch.tensor([True, False, False]),
        torch.tensor([[False, True, False], [False, False, True]]),
    ):
        found = ours.radius_graph_pbc(data, 5.0, ALL, pbc=pbc)
        assert_same(found, theirs.radius_graph_pbc(data, 5.0, ALL, pbc=pbc))
        assert_same(
            ours.radius_graph_pbc_v2(data, 5.0, ALL, pbc=pbc), theirs.radius_graph_pbc_v2(data, 5.0, ALL)
        )


def test_node_partition():
    data = data_of(SYSTEMS["random_box"], SYSTEMS["silicon"])
    data["node_partition"] = torch.tensor([0, 3, 4, 30, 40])
    for most in (ALL, 5):
        expected = theirs.radius_graph_pbc_v2(data, 5.0, most)
        assert_same(ours.radius_graph_pbc_v2(data, 5.0, most), expected)


def test_atoms_anywhere():
    """Atoms outside the cell: the same distances as inside, where both of fairchem's lists lose edges."""
    data = data_of(SYSTEMS["salt"])
    inside = compute.generate_graph(data, 5.0, ALL, False, 1, None)["edge_distance"].sort().values
    data.pos[::2] += data.cell[0, 0] * 3.0
    for mine, other in VERSIONS.values():
        edge_index, cell_offsets, neighbors = mine(data, 5.0, ALL)
        found = compute.get_pbc_distances(data.pos, edge_index, data.cell, cell_offsets, neighbors)[
            "distances"
        ]
        torch.testing.assert_close(found.sort().values, inside)
        assert other(data, 5.0, ALL)[0].shape[1] < edge_index.shape[1]


def test_errors():
    data = data_of(SYSTEMS["salt"])
    with pytest.raises(ValueError, match="`radius` must be finite and > 0"):
        ours.radius_graph_pbc(data, float("inf"), ALL)
    data.cell[0, 1] = data.cell[0, 0]
    with pytest.raises(ValueError, match="`cell`"):
        ours.radius_graph_pbc(data, 5.0, ALL)
    with pytest.raises(AssertionError, match="pbc"):
        ours.radius_graph_pbc(object(), 5.0, ALL)


def without_batch(name):
    data = data_of(SYSTEMS[name])
    return SimpleNamespace(pos=data.pos, cell=data.cell, pbc=data.pbc, natoms=data.natoms)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("natoms", "error", "message"),
    [
        ([7], ValueError, r"`natoms` must be >= 0 and add up to N = 8; got \[7\]"),
        ([9], ValueError, r"`natoms` must be >= 0 and add up to N = 8; got \[9\]"),
        ([4, 4], ValueError, r"`natoms` must have shape \(B,\) = \(1,\); got \(2,\)"),
        ([8.0], TypeError, "`natoms` must have an integer dtype; got torch.float"),
    ],
)
def test_numbers_of_atoms_that_are_not_those_of_the_systems(version, natoms, error, message):
    data = without_batch("salt")
    data.natoms = torch.tensor(natoms)
    with pytest.raises(error, match=message):
        VERSIONS[version][0](data, 5.0, ALL)


def test_negative_numbers_of_atoms():
    data = without_batch("salt")
    data.natoms, data.cell, data.pbc = torch.tensor([9, -1]), data.cell.expand(2, 3, 3), data.pbc.expand(2, 3)
    with pytest.raises(ValueError, match=r"`natoms` must be >= 0 and add up to N = 8; got \[9, -1\]"):
        ours.radius_graph_pbc(data, 5.0, ALL)


def test_the_number_of_atoms_of_one_system_in_any_form():
    data = without_batch("salt")
    expected = ours.radius_graph_pbc(data_of(SYSTEMS["salt"]), 5.0, ALL)
    for natoms in (8, [8], torch.tensor(8), torch.tensor([8], dtype=torch.int32)):
        data.natoms = natoms
        assert_same(ours.radius_graph_pbc(data, 5.0, ALL), expected)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([True] * 8, TypeError, "`node_partition` must have an integer dtype; got torch.bool"),
        ([0, 8], ValueError, r"`node_partition` must hold numbers of atoms in \[0, 8\); got 8"),
        ([-1, 0], ValueError, r"`node_partition` must hold numbers of atoms in \[0, 8\); got -1"),
    ],
)
def test_a_node_partition_that_holds_no_numbers_of_atoms(targets, error, message):
    data = data_of(SYSTEMS["salt"])
    data["node_partition"] = torch.tensor(targets)
    with pytest.raises(error, match=message):
        ours.radius_graph_pbc_v2(data, 5.0, ALL)


@pytest.fixture
def installed(monkeypatch):
    """Both functions in fairchem's `generate_graph`, taken out again at the end."""
    for name in ("radius_graph_pbc", "radius_graph_pbc_v2"):
        monkeypatch.setattr(compute, name, getattr(compute, name))
    return ours.install


@pytest.mark.parametrize("version", VERSIONS)
def test_generate_graph(installed, version):
    data = data_of(SYSTEMS["random_box"], SYSTEMS["salt"])
    data.pos.requires_grad_()
    data.cell.requires_grad_()

    def graph():
        out = compute.generate_graph(data, 5.0, 30, False, version, data.pbc)
        j, i = out["edge_index"]
        S = out["cell_offsets"]
        vectors, distances = out["edge_distance_vec"], out["edge_distance"]
        grads = torch.autograd.grad((distances**3).sum() + vectors[:, 0].pow(2).sum(), (data.pos, data.cell))
        found = canonical(i, j, S, vectors.detach(), distances.detach(), out["offset_distances"].detach())
        return *found, out["neighbors"].numpy(), *(grad.numpy() for grad in grads)

    expected = graph()
    installed()
    assert compute.radius_graph_pbc is ours.radius_graph_pbc
    for x, y in zip(graph(), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
def test_model(installed, version):
    """A random eSCN-MD: energy, forces and stress with fairchem's graphs and with these."""
    torch.manual_seed(0)
    backbone = eSCNMDBackbone(
        sphere_channels=8,
        lmax=2,
        mmax=2,
        num_layers=2,
        hidden_channels=8,
        edge_channels=8,
        num_distance_basis=16,
        cutoff=5.0,
        max_neighbors=20,
        otf_graph=True,
        always_use_pbc=False,
        regress_stress=True,
        direct_forces=False,
        dataset_list=["omat"],
        radius_pbc_version=version,
    )
    head = MLP_EFS_Head(backbone)

    def predict():
        data = data_of(SYSTEMS["salt"], SYSTEMS["silicon_sheared"], dtype=torch.float32)
        return {name: out[name].detach() for name, out in head(data, backbone(data)).items()}

    expected = predict()
    installed()
    found = predict()
    assert {"energy", "forces", "stress"} <= set(found)
    for name, value in found.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_recipe(installed):
    names = run_recipe("fairchem")
    assert compute.radius_graph_pbc_v2 is ours.radius_graph_pbc_v2
    assert names["graph"]["edge_index"].shape[1] == int(names["graph"]["neighbors"].sum()) > 0
