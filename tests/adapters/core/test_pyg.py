import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch_cluster
from ase.neighborlist import neighbor_list
from recipes import run_recipe
from structures import STRUCTURES, canonical, random_box
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn.models import SchNet
from torch_geometric.transforms import Compose, Distance

import diffnl
from diffnl.adapters.pyg import InteractionGraph, PeriodicRadiusGraph, radius_graph

ADAPTER = "torch_cluster, PyG"
PACKAGES = ("torch_cluster", "torch-geometric")

SYSTEMS = {**STRUCTURES, "random_box": random_box()}
FLOWS = "source_to_target", "target_to_source"


def points(n, dim=3, dtype=torch.float64, seed=0):
    return torch.rand(n, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 4.0


def in_order(edge_index, center_row=1):
    i, j = edge_index[center_row], edge_index[1 - center_row]
    return edge_index[:, np.lexsort((j, i))]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_same_edges(dim, dtype, loop, flow):
    x, center_row = points(80, dim, dtype), int(flow == FLOWS[0])
    batch = torch.arange(3).repeat_interleave(torch.tensor([30, 1, 49]))
    for options in ({}, {"batch": batch}, {"batch": batch, "batch_size": 4}):
        found = radius_graph(x, 1.1, loop=loop, max_num_neighbors=100, flow=flow, **options)
        expected = torch_cluster.radius_graph(x, 1.1, loop=loop, max_num_neighbors=100, flow=flow, **options)
        assert found.dtype == expected.dtype
        assert torch.equal(found, in_order(expected, center_row))
        assert torch.equal(found, in_order(found, center_row))


@pytest.mark.filterwarnings("ignore:`max_num_neighbors`")
def test_sides_of_the_rows():
    """With max_num_neighbors = 1, the row that holds every point once is the centre's."""
    x = torch.tensor([[0.0], [1.0], [1.5]])
    for graph in (radius_graph, torch_cluster.radius_graph):
        assert graph(x, 0.7, flow=FLOWS[0]).tolist() == [[2, 1], [1, 2]]
        source, target = graph(x, 2.0, loop=True, max_num_neighbors=1, flow=FLOWS[0])
        assert target.tolist() == [0, 1, 2]
        target, source = graph(x, 2.0, loop=True, max_num_neighbors=1, flow=FLOWS[1])
        assert target.tolist() == [0, 1, 2]


def test_one_dimension_and_nothing():
    x = points(20, 1)[:, 0]
    assert torch.equal(radius_graph(x, 0.5), in_order(torch_cluster.radius_graph(x, 0.5)))
    for empty in (torch.empty(0, 3), torch.empty(0), torch.empty(5, 0)):
        for graph in (radius_graph, torch_cluster.radius_graph):
            assert graph(empty, 1.0).shape == (2, 0)
    assert radius_graph(points(1), 1.0).shape == torch_cluster.radius_graph(points(1), 1.0).shape == (2, 0)
    assert radius_graph(points(1), 1.0, loop=True).tolist() == [[0], [0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_radius_itself_is_not_within(dtype):
    x = torch.tensor([[0.0, 0, 0], [3.3, 0, 0]], dtype=dtype)
    for graph in (radius_graph, torch_cluster.radius_graph):
        assert graph(x, float(x[1, 0])).shape[1] == 0
        assert graph(x, float(x[1, 0]) * 1.0001).shape[1] == 2


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("most", [1, 5, 12])
def test_most_neighbors(most, loop):
    x = points(60)
    everything = radius_graph(x, 2.0, loop=loop, max_num_neighbors=None)
    with pytest.warns(UserWarning, match=f"`max_num_neighbors` = {most} drops"):
        found = radius_graph(x, 2.0, loop=loop, max_num_neighbors=most)
    counts = np.bincount(everything[1], minlength=60)
    np.testing.assert_array_equal(np.bincount(found[1], minlength=60), np.minimum(counts, most))
    for i in range(60):  # the lowest numbers
        j = everything[0, everything[1] == i]
        assert torch.equal(found[0, found[1] == i], j[:most])
    if loop:
        expected = torch_cluster.radius_graph(x, 2.0, loop=True, max_num_neighbors=most)
        np.testing.assert_array_equal(np.bincount(expected[1], minlength=60), np.minimum(counts, most))


@pytest.mark.filterwarnings("ignore:`max_num_neighbors`")
def test_no_point_too_many():
    """torch_cluster leaves room for the point itself; points 2 and 3 are not among the first two of all."""
    x = torch.tensor([0.0, 0.1, 0.2, 0.3])
    options = {"r": 1.0, "max_num_neighbors": 1}
    assert np.bincount(torch_cluster.radius_graph(x, **options)[1]).tolist() == [1, 1, 2, 2]
    assert np.bincount(radius_graph(x, **options)[1]).tolist() == [1, 1, 1, 1]


def test_default_keeps_32():
    x = points(200, dtype=torch.float32) * 0.1
    with pytest.warns(UserWarning, match="drops"):
        assert radius_graph(x, 2.0).shape[1] == 200 * 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert radius_graph(x[:33], 2.0).shape[1] == 33 * 32


def test_errors():
    with pytest.raises(ValueError, match=r"`x` must have shape \(N,\) or \(N, F\) with F <= 3; got \(9, 4\)"):
        radius_graph(points(9, 4), 1.0)
    with pytest.raises(ValueError, match="`flow` must be"):
        radius_graph(points(9), 1.0, flow="sideways")
    with pytest.raises(ValueError, match="`flow` must be"):
        PeriodicRadiusGraph(1.0, flow="sideways")
    with pytest.raises(ValueError, match="`r` must be finite and > 0"):
        radius_graph(points(9), 0.0)
    with pytest.raises(TypeError, match="must be float32 or float64"):
        radius_graph(points(9).half(), 1.0)
    with pytest.raises(ValueError, match="`system_idx` must have shape"):
        radius_graph(points(9), 1.0, batch=torch.zeros(8, dtype=torch.int64))


def data_of(atoms, dtype=torch.float64):
    return Data(
        pos=torch.tensor(atoms.positions, dtype=dtype),
        z=torch.tensor(atoms.numbers),
        cell=torch.tensor(atoms.cell.array, dtype=dtype)[None],
        pbc=torch.tensor(atoms.pbc)[None],
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_transform_lists_what_ase_lists(name):
    atoms = SYSTEMS[name]
    data = PeriodicRadiusGraph(5.0)(data_of(atoms))
    i, j, S, D = neighbor_list("ijSD", atoms, 5.0)
    expected = canonical(i, j, S, D)
    (source, target) = data.edge_index
    for x, y in zip(canonical(target, source, data.cell_shifts, data.edge_vec), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
    other = PeriodicRadiusGraph(5.0, flow=FLOWS[1])(data_of(atoms))
    assert torch.equal(other.edge_index, data.edge_index.flip(0)) and torch.equal(
        other.edge_vec, data.edge_vec
    )


def test_transform_before_and_after_batching():
    systems = [data_of(SYSTEMS[name]) for name in ("salt", "graphene", "ethanol", "silicon")]
    transform = PeriodicRadiusGraph(5.0)
    one_by_one = Batch.from_data_list([transform(data) for data in systems])
    together = transform(Batch.from_data_list(systems))
    for key in ("edge_index", "cell_shifts", "edge_vec"):
        assert torch.equal(one_by_one[key], together[key])
    pos = together.pos.requires_grad_()
    again = diffnl.pair_vectors(
        pos, together.cell, together.edge_index.flip(0), together.cell_shifts, together.batch
    )
    assert torch.equal(again, together.edge_vec) and again.requires_grad


def test_transform_in_a_pipeline():
    """Pickled into DataLoader workers, before another transform, and without a trace in the dataset."""
    transform = pickle.loads(pickle.dumps(Compose([PeriodicRadiusGraph(4.0), Distance(norm=False)])))
    assert repr(transform.transforms[0]) == "PeriodicRadiusGraph(r=4.0)"
    systems = [data_of(SYSTEMS["ethanol"]), data_of(SYSTEMS["one_atom"])]
    done = [transform(data) for data in systems]
    assert all("edge_index" not in data for data in systems)
    i, j = done[0].edge_index
    torch.testing.assert_close(done[0].edge_attr[:, 0], (systems[0].pos[i] - systems[0].pos[j]).norm(dim=1))

    class Systems(torch.utils.data.Dataset):
        def __len__(self):
            return len(systems)

        def __getitem__(self, index):
            return transform(systems[index])

    (batch,) = DataLoader(Systems(), batch_size=2, num_workers=1)
    assert torch.equal(batch.edge_vec, Batch.from_data_list(done).edge_vec)


def test_transform_without_cell_or_pbc():
    data = PeriodicRadiusGraph(1.0)(Data(pos=points(30), edge_attr=torch.ones(3)))
    assert torch.equal(data.edge_index, radius_graph(points(30), 1.0, max_num_neighbors=None))
    assert data.edge_attr is None and not data.cell_shifts.any()
    with_cell = Data(pos=points(30), cell=4.0 * torch.eye(3, dtype=torch.float64)[None])
    found = PeriodicRadiusGraph(1.0)(with_cell)
    expected = diffnl.neighbor_pairs(points(30), with_cell.cell[0], True, 1.0, sorted=True)
    assert torch.equal(found.edge_index.flip(0), expected.mapping)


FLAGS = {
    "a flag": (True, [True] * 3),
    "no flag": (False, [False] * 3),
    "a list": ([True, False, True], [True, False, True]),
    "a tuple": ((1, 1, 0), [True, True, False]),
    "an array": (np.array([False, True, True]), [False, True, True]),
    "a tensor of one": (torch.tensor(True), [True] * 3),
    "a tensor": (torch.tensor([True, False, False]), [True, False, False]),
}


@pytest.mark.parametrize("form", FLAGS)
def test_flags_in_every_form_of_the_search(form):
    data, (pbc, flags) = data_of(SYSTEMS["salt"]), FLAGS[form]
    expected = diffnl.neighbor_pairs(data.pos, data.cell, torch.tensor(flags), 4.0, sorted=True)
    data.pbc = pbc
    found = PeriodicRadiusGraph(4.0)(data)
    assert torch.equal(found.edge_index.flip(0), expected.mapping)
    assert torch.equal(found.cell_shifts, expected.shifts)


FLAGS_OF_EACH = {
    "flags": [True, False, True],
    "lists": [[True, False, False], [True] * 3, [False, True, True]],
    "arrays": [np.array([True, False, False]), np.ones(3, dtype=bool), np.array([False, True, True])],
    "tensors": [torch.tensor([True, False, False]), torch.ones(3, dtype=bool), torch.zeros(3, dtype=bool)],
}


@pytest.mark.parametrize("form", FLAGS_OF_EACH)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_flags_in_every_form_after_batching(count, form):
    """PyG makes a tensor (B,) of single flags: of three graphs it looks like the flags of three axes."""
    systems = [data_of(SYSTEMS[name]) for name in ("salt", "silicon", "ethanol")][:count]
    for data, pbc in zip(systems, FLAGS_OF_EACH[form], strict=False):
        data.cell, data.pbc = 9.0 * torch.eye(3, dtype=torch.float64)[None], pbc
    transform = PeriodicRadiusGraph(4.0)
    one_by_one = Batch.from_data_list([transform(data) for data in systems])
    together = transform(Batch.from_data_list(systems))
    for key in ("edge_index", "cell_shifts", "edge_vec"):
        assert torch.equal(one_by_one[key], together[key])


def test_flags_that_are_none():
    data = data_of(SYSTEMS["salt"])
    for pbc, error in (
        ("TTF", TypeError),
        ([True, False], ValueError),
        (torch.tensor([True] * 2), ValueError),
    ):
        data.pbc = pbc
        with pytest.raises(error, match="`pbc` must"):
            PeriodicRadiusGraph(4.0)(data)


def test_schnet():
    """PyG's SchNet: torch_cluster's graph and its own distances against ours through diffnl."""

    class TheirGraph(torch.nn.Module):
        def forward(self, pos, batch):
            edge_index = torch_cluster.radius_graph(pos, 3.0, batch, max_num_neighbors=100)
            i, j = edge_index
            return edge_index, (pos[i] - pos[j]).norm(dim=1)

    torch.manual_seed(0)
    options = {
        "hidden_channels": 8,
        "num_filters": 8,
        "num_interactions": 2,
        "num_gaussians": 10,
        "cutoff": 3.0,
    }
    model = SchNet(**options, interaction_graph=TheirGraph()).double()
    systems = [data_of(SYSTEMS[name]) for name in ("ethanol", "salt")]
    batch = Batch.from_data_list(systems)

    def predict(model):
        pos = batch.pos.clone().requires_grad_()
        energy = model(batch.z, pos, batch.batch)
        (forces,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        (second,) = torch.autograd.grad(forces.square().sum(), pos)
        return energy, forces, second

    mine = copy.deepcopy(model)
    mine.interaction_graph = InteractionGraph(3.0)
    for x, y in zip(predict(mine), predict(model), strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_recipe():
    names = run_recipe("torch_cluster and PyG")
    crystal = names["crystal"]
    distances = crystal.edge_vec.norm(dim=1)
    assert 0 < len(distances) == crystal.edge_index.shape[1] and distances.max() < 5.0
    assert names["edge_index"].shape[0] == 2
