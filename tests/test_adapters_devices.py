"""The adapters that take tensors: a GPU gives what the CPU gives. None needs the package it is for."""

from types import SimpleNamespace

import pytest
import torch
from compare import on_cpu
from systems import SYSTEMS

from diffnl.adapters import fairchem, hip_torch_nl, mace, nequip, nvalchemi, pyg, torchmdnet, torchsim

CUTOFF = 4.0


def batch(device):
    """Three periodic systems in order, as most codes want them: positions, cell, pbc, system_idx."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(5)
        sizes = torch.tensor([3, 5, 4])
        cell = torch.eye(3, dtype=torch.float64) * torch.tensor([4.0, 5.0, 4.5])[:, None, None]
        cell = cell + 0.3 * torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
        system_idx = torch.repeat_interleave(torch.arange(3), sizes)
        fractional = torch.rand(12, 1, 3, generator=generator, dtype=torch.float64)
        positions = (fractional @ cell[system_idx]).squeeze(1)
        pbc = torch.tensor([[True] * 3, [True, False, True], [True] * 3])
    return tuple(t.to(device) for t in (positions, cell, pbc, system_idx))


def of_hip_torch_nl(r, h, pbc, index):
    one = index == 0
    return hip_torch_nl.hip_torch_nl(
        r[one], h[0], pbc[0], torch.tensor(CUTOFF, device=r.device), sort_id=True
    )


def of_torchsim(r, h, pbc, index):
    one = index == 0
    single = torchsim.unbatched_nl(r[one], h[0], pbc[0], CUTOFF, sort_id=True)
    mapping, system_mapping, shifts = torchsim.torchsim_nl(r, h, pbc, CUTOFF, index, self_interaction=True)
    order = canonical_order(mapping, shifts)
    return *single, mapping[:, order], system_mapping[order], shifts[order]


def of_nvalchemi(r, h, pbc, index):
    options = {"cell": h, "pbc": pbc, "batch_idx": index, "return_vectors": True}
    mapping, starts, shifts, vectors = nvalchemi.neighbor_list(
        r, CUTOFF, return_neighbor_list=True, **options
    )
    order = canonical_order(mapping, shifts)
    matrix = nvalchemi.neighbor_list(r, CUTOFF, max_neighbors=80, **options)
    return mapping[:, order], starts, shifts[order], vectors[order], matrix[0].sort().values, matrix[1]


def of_pyg(r, h, pbc, index):
    edges = pyg.radius_graph(r, CUTOFF, index, loop=True, max_num_neighbors=None)
    data = SimpleNamespace(pos=r, cell=h, pbc=pbc, batch=index)
    found = pyg.PeriodicRadiusGraph(CUTOFF)(data)
    graph, distances = pyg.InteractionGraph(CUTOFF)(r, index)
    order = canonical_order(graph.flip(0), graph.new_zeros(graph.shape[1], 3))
    return edges, found.edge_index, found.cell_shifts, found.edge_vec, graph[:, order], distances[order]


def of_torchmdnet(r, h, pbc, index):
    found = []
    for fit in (True, False):
        layer = torchmdnet.OptimizedDistance(1.0, CUTOFF, -120, return_vecs=True, resize_to_fit=fit)
        edges, distances, vectors = layer(r, index, h)
        order = canonical_order(edges.flip(0), vectors)
        found += [edges[:, order], distances[order], vectors[order]]
    return found


def of_fairchem(r, h, pbc, index):
    data = SimpleNamespace(pos=r, cell=h, natoms=index.bincount(), pbc=pbc)
    return fairchem.radius_graph_pbc(data, CUTOFF, 9) + fairchem.radius_graph_pbc_v2(data, CUTOFF, -1)


def of_nequip(r, h, pbc, index):
    data = nequip.neighbor_list({"pos": r, "cell": h, "pbc": pbc, "batch": index}, CUTOFF)
    order = canonical_order(data["edge_index"], data["edge_cell_shift"])
    return data["edge_index"][:, order], data["edge_cell_shift"][order]


def of_mace(r, h, pbc, index):
    sender = torch.arange(len(r), device=r.device)
    sizes = index.bincount()
    ends = sizes.cumsum(0)
    edges = torch.stack((sender, (2 * ends - sizes - 1)[index] - sender))  # each system's atoms backwards
    r, h = r.clone().requires_grad_(), h.clone().requires_grad_()
    unit_shifts = torch.ones_like(r)
    vectors, lengths = mace.edge_vectors_and_lengths(r, edges, unit_shifts, h.reshape(-1, 3), index)
    return vectors, lengths, *torch.autograd.grad(lengths.sum(), (r, h))


def canonical_order(mapping, shifts):
    """Ascending (i, j, S); S may be anything of three columns that tells pairs apart."""
    mapping, shifts = mapping.cpu(), shifts.detach().cpu()
    order = torch.arange(mapping.shape[1], device="cpu")
    for key in (*shifts.T, mapping[1], mapping[0]):
        order = order[torch.argsort(key[order], stable=True)]
    return order.to(mapping.device)


CASES = [of_hip_torch_nl, of_torchsim, of_nvalchemi, of_pyg, of_torchmdnet, of_fairchem, of_nequip, of_mace]


@pytest.mark.filterwarnings("ignore:`max_num_neighbors_threshold` = 9 drops")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__[3:])
def test_same_as_on_the_cpu(case, device):
    ours, expected = case(*batch(device)), on_cpu(case(*batch("cpu")))
    assert all(t.device.type == torch.device(device).type for t in ours)
    for one, other in zip(on_cpu(ours), expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.numel() > 0
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_periodic_systems_only_where_they_are(device):
    """The test above compares something: pairs through images, and none of them on an open axis."""
    positions, cell, pbc, index = batch(device)
    mapping, systems, shifts = torchsim.torchsim_nl(positions, cell, pbc, CUTOFF, index)
    assert (shifts != 0).any() and not (shifts[~pbc[systems]] != 0).any()
    assert torch.equal(systems, index[mapping[0]])


def test_a_cell_of_zeros_is_open(device):
    positions, _, _, _ = SYSTEMS["molecule"].arguments(torch.float64, device)
    mapping, _ = hip_torch_nl.hip_torch_nl(positions, positions.new_zeros(3, 3), False, CUTOFF)
    edges = pyg.radius_graph(positions, CUTOFF, max_num_neighbors=None)
    assert mapping.shape == edges.shape
