"""What only a GPU can show, graphs: padded lists captured once, replayed with other positions and cells.

Run without pytest-xdist: no other process should use the GPU meanwhile.
"""

import pytest
import torch
from compare import assert_close_sums, assert_equal_bits, assert_same_bits
from gpu_waits import waits_of
from systems import TRICLINIC, cubic, scatter, tensor
from walks import npt_walk, wrap

import diffnl

CUTOFF = 5.0
CAPACITY = 6_000


class Captured:
    """`step(positions, cell)` of static inputs, in a graph."""

    def __init__(self, step, positions, cell):
        self.positions, self.cell = positions.clone().requires_grad_(), cell.clone().requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(self.positions, self.cell)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = step(self.positions, self.cell)

    def __call__(self, positions, cell):
        with torch.no_grad():
            self.positions.copy_(positions)
            self.cell.copy_(cell)
        self.graph.replay()
        return self.outputs


def moved(positions, cell, step):
    """The system of one step of a walk."""
    generator = torch.Generator().manual_seed(step)
    eps = 0.02 * torch.randn(cell.shape, generator=generator, dtype=torch.float64).to(cell)
    noise = 0.3 * torch.randn(positions.shape, generator=generator, dtype=torch.float64).to(positions)
    return positions + noise, cell + cell @ eps


def energy_of(vectors):
    """Smooth and 0 at the cutoff, so that padding adds nothing."""
    x = (vectors.square().sum(-1) / CUTOFF**2).clamp(max=1.0)
    return (1.0 - x).pow(3).sum()


@pytest.fixture(params=["bulk", "tiny_cell"])
def box(request, gpu, dtype):
    """One launch files all atoms of these; the walk in `test_a_walk` is a batch."""
    cell = cubic(11.0) if request.param == "bulk" else [[x / 2 for x in row] for row in TRICLINIC]
    atoms = 90 if request.param == "bulk" else 4
    return scatter(atoms, cell, 3).to(gpu, dtype), tensor(cell).to(gpu, dtype)


def test_stresses_of_a_batch(gpu, dtype):
    """Forces and stress of several systems, and their derivatives, in one graph: a training step's."""
    layer = diffnl.NeighborList(CUTOFF, capacity=CAPACITY)
    cell = torch.stack([tensor(cubic(9.0)), tensor(cubic(11.0))]).to(gpu, dtype)
    positions = torch.cat([scatter(40, cubic(9.0), 1), scatter(50, cubic(11.0), 2)]).to(gpu, dtype)
    system_idx = (torch.arange(90, device=gpu) >= 40).long()
    pbc = torch.ones(2, 3, dtype=torch.bool, device=gpu)

    def step(positions, cell):
        pairs = layer(positions, cell, pbc, system_idx)
        x = (pairs.vectors.square().sum(-1) / CUTOFF**2).clamp(max=1.0)
        where = system_idx[pairs.mapping[0]]
        energy = positions.new_zeros(2).index_put((where,), (1.0 - x).pow(3), accumulate=True)
        forces, stress = diffnl.forces_and_stress(energy, positions, cell, system_idx, create_graph=True)
        loss = forces.square().sum() + stress.square().sum()
        return forces.detach(), stress.detach(), *torch.autograd.grad(loss, (positions, cell))

    captured = Captured(step, positions, cell)
    for n in range(5):
        inputs = moved(positions, cell, n)
        ours = captured(*inputs)
        theirs = step(*(x.requires_grad_() for x in inputs))
        assert theirs[1].abs().max() > 0
        assert_equal_bits(ours, theirs)


@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_forward_and_backward(full, in_order, box):
    """A replay gives the bits of an eager call, gradients included."""
    layer = diffnl.NeighborList(CUTOFF, full=full, sorted=in_order, capacity=CAPACITY)

    def step(positions, cell):
        pairs = layer(positions, cell, (True, True, False))
        return *pairs, *torch.autograd.grad(energy_of(pairs.vectors), (positions, cell))

    captured = Captured(step, *box)
    for n in range(10):
        positions, cell = moved(*box, n)
        ours = captured(positions, cell)
        theirs = step(positions.requires_grad_(), cell.requires_grad_())
        assert 0 < int(ours[3]) == int(theirs[3]) <= CAPACITY
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


def test_double_backward(box):
    layer = diffnl.NeighborList(CUTOFF, capacity=CAPACITY)

    def step(positions, cell):
        energy = energy_of(layer(positions, cell, True).vectors)
        first = torch.autograd.grad(energy, (positions, cell), create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        return *first, *torch.autograd.grad(loss, (positions, cell))

    captured = Captured(step, *box)
    for n in range(5):
        positions, cell = moved(*box, n)
        ours = captured(positions, cell)
        for one, other in zip(ours, step(positions.requires_grad_(), cell.requires_grad_()), strict=True):
            assert torch.equal(one, other)


def test_a_walk(gpu, dtype):
    """A batch with mixed pbc: replays against fresh lists, step by step."""
    walk = npt_walk(300, dtype, gpu)
    positions, cell, pbc, system_idx = next(walk)
    layer = diffnl.NeighborList(CUTOFF, capacity=CAPACITY)
    captured = Captured(lambda r, h: layer(r, h, pbc, system_idx), positions, cell)
    for positions, cell, *_ in walk:
        padded = captured(positions, cell)
        fresh = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF, system_idx)
        count = int(padded.num_pairs)
        assert_same_bits((padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]), fresh)


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_a_walk_with_a_skin(full, gpu, dtype):
    """Replays decide by themselves when to search, and give the pairs and gradients of a fresh list."""
    walk = npt_walk(400, dtype, gpu)
    positions, cell, pbc, system_idx = next(walk)
    layer = diffnl.NeighborList(CUTOFF, full=full, skin=1.0, capacity=CAPACITY)

    def step(r, h, find=layer):
        pairs = find(r, h, pbc, system_idx)
        return *pairs, *torch.autograd.grad(energy_of(pairs.vectors), (r, h))

    captured = Captured(step, positions, cell)
    searched, reused = layer.searches, layer.reuses
    for positions, cell, *_ in walk:
        *padded, ours_r, ours_h = captured(positions, cell)
        leaves = positions.requires_grad_(), cell.requires_grad_()
        fresh = diffnl.neighbor_pairs(*leaves, pbc, CUTOFF, system_idx, full=full, sorted=True)
        count = int(padded[3])
        assert_same_bits((padded[0][:, :count], padded[1][:count], padded[2][:count]), fresh)
        theirs = torch.autograd.grad(energy_of(fresh.vectors), leaves)
        assert_close_sums((ours_r, ours_h), theirs)
    assert layer.searches + layer.reuses == searched + reused + 399
    assert layer.reuses - reused > 10 * (layer.searches - searched) > 0


def test_a_graph_keeps_its_candidates(box):
    """The layer is used for another system meanwhile: what the graph writes to must not be given away."""
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=CAPACITY)
    captured = Captured(lambda r, h: layer(r, h, True), *box)
    before = [t.clone() for t in captured(*box)]
    for atoms in (10, 20, 30):
        layer(torch.rand(atoms, 3).to(box[0]), box[1], True)
    torch.empty(1 << 20, device="cuda").fill_(torch.nan)
    assert all(map(torch.equal, captured(*box), before))


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_a_skin_and_wrapped_positions(full, gpu, dtype):
    """Replays search as often as those of unwrapped positions, and give the bits of a fresh list."""
    walk = list(npt_walk(300, torch.float64))
    _, _, pbc, system_idx = (t.to(gpu) for t in walk[0])
    layers = [diffnl.NeighborList(CUTOFF, full=full, skin=1.0, capacity=CAPACITY) for _ in range(2)]

    def step_of(layer):
        def step(r, h):
            pairs = layer(r, h, pbc, system_idx)
            return *pairs, *torch.autograd.grad(energy_of(pairs.vectors), (r, h))

        return step

    first = [t.to(gpu, dtype) for t in walk[0][:2]]
    as_it_is, wrapped = (Captured(step_of(layer), *first) for layer in layers)
    searches = [layer.searches for layer in layers]
    for positions, cell, *rest in walk:
        h = cell.to(gpu, dtype)
        as_it_is(positions.to(gpu, dtype), h)
        inside = wrap(positions, cell, *rest).to(gpu, dtype)
        *padded, ours_r, ours_h = wrapped(inside, h)
        leaves = inside.requires_grad_(), h.requires_grad_()
        fresh = diffnl.neighbor_pairs(*leaves, pbc, CUTOFF, system_idx, full=full, sorted=True)
        count = int(padded[3])
        assert_same_bits((padded[0][:, :count], padded[1][:count], padded[2][:count]), fresh)
        theirs = torch.autograd.grad(energy_of(fresh.vectors), leaves)
        assert_close_sums((ours_r, ours_h), theirs)
    needed, with_wrapping = (layer.searches - before for layer, before in zip(layers, searches, strict=True))
    assert 0 < with_wrapping <= 1.1 * needed < 100


def captured_without_warm_up(step, *inputs):
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
    return graph, outputs


def test_a_graph_of_the_first_call_keeps_candidates(box):
    """Their memory was made and cleared inside the capture: each of 5 replays searched."""
    positions, cell = box
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=CAPACITY)
    graph, padded = captured_without_warm_up(lambda r, h: layer(r, h, True), positions, cell)
    fresh = diffnl.neighbor_pairs(positions, cell, True, CUTOFF, sorted=True)
    for _ in range(5):
        graph.replay()
        count = int(padded.num_pairs)
        assert_same_bits((padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]), fresh)
    assert (layer.searches, layer.reuses) == (1, 4)


def test_each_call_of_each_graph_has_candidates_of_its_own(box):
    """Two systems of one shape in one graph, and the same again in another: every call searches once."""
    positions, cell = box
    other = (positions + 0.37 * cell.sum(0)).flip(0)
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=CAPACITY)

    def step(r, h):
        return layer(r, h, True), layer(other, h, True)

    step(positions, cell)
    searches, reuses = layer.searches, layer.reuses
    graphs = [captured_without_warm_up(step, positions, cell) for _ in range(2)]
    expected = [diffnl.neighbor_pairs(r, cell, True, CUTOFF, sorted=True) for r in (positions, other)]
    for _ in range(4):
        for graph, outputs in graphs:
            graph.replay()
            for padded, fresh in zip(outputs, expected, strict=True):
                count = int(padded.num_pairs)
                ours = padded.mapping[:, :count], padded.shifts[:count], padded.vectors[:count]
                assert_same_bits(ours, fresh)
        layer(positions, cell, True)  # and this has others again
    assert layer.searches - searches <= 5 and layer.reuses - reuses >= 15


def test_reset_frees_the_candidates_of_graphs(box):
    """`reset` is how memory that graphs write is given back; the layer goes on."""
    layer = diffnl.NeighborList(CUTOFF, skin=1.0, capacity=1_000_000)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        graph, outputs = captured_without_warm_up(lambda r, h: layer(r, h, True), *box)
        graph.replay()
        del graph, outputs
    assert torch.cuda.memory_allocated() - before > 3 * 8_000_000
    layer.reset()
    assert torch.cuda.memory_allocated() - before < 8_000_000
    searches = layer.searches
    layer(*box, True).check()
    assert layer.searches == searches + 1


def test_a_large_system(gpu, dtype):
    """Many launches file its atoms."""
    positions, cell = scatter(9_000, cubic(48.0), 5).to(gpu, dtype), tensor(cubic(48.0)).to(gpu, dtype)
    capacity = diffnl.estimate_capacity(positions, cell, True, CUTOFF)
    layer = diffnl.NeighborList(CUTOFF, capacity=capacity)

    def step(r, h):
        pairs = layer(r, h, True)
        return *pairs, *torch.autograd.grad(energy_of(pairs.vectors), (r, h))

    captured = Captured(step, positions, cell)
    for n in range(3):
        r, h = moved(positions, cell, n)
        ours, theirs = captured(r, h), step(r.requires_grad_(), h.requires_grad_())
        assert all(map(torch.equal, ours, theirs))


def test_a_replay_that_overflows_is_nan_and_the_next_is_not(box):
    positions, cell = box
    needed = diffnl.neighbor_pairs(positions, cell, True, CUTOFF).shifts.shape[0]
    layer = diffnl.NeighborList(CUTOFF, capacity=needed + 50)

    def step(r, h):
        pairs = layer(r, h, True)
        return pairs, torch.autograd.grad(energy_of(pairs.vectors), (r, h))

    captured = Captured(step, positions, cell)
    for bad in ((positions, 0.5 * cell), (positions * torch.nan, cell), (positions, 0.0 * cell)):
        pairs, gradients = captured(*bad)
        assert pairs.vectors.isnan().all() and all(gradient.isnan().all() for gradient in gradients)
        with pytest.raises(ValueError):
            pairs.check()
        pairs, gradients = captured(positions, cell)
        assert int(pairs.check().num_pairs) == needed
        assert pairs.vectors.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_replays_do_not_allocate(box):
    layer = diffnl.NeighborList(CUTOFF, capacity=CAPACITY)

    def step(r, h):
        return torch.autograd.grad(energy_of(layer(r, h, True).vectors), (r, h))

    captured = Captured(step, *box)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        captured.graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.filterwarnings("ignore")  # what the profiler has to say about itself
@pytest.mark.parametrize("skin", [0.0, 1.0])
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_an_eager_call_waits_for_nothing(full, skin, box):
    positions, cell = (t.clone().requires_grad_() for t in box)
    layer = diffnl.NeighborList(CUTOFF, full=full, skin=skin, capacity=CAPACITY)
    assert waits_of(lambda: cell.sum().item()) >= 1, "a wait would go unnoticed"

    def step():
        energy = energy_of(layer(positions, cell, (True, False, True)).vectors)
        return torch.autograd.grad(energy, (positions, cell))

    assert waits_of(step) == 0


@pytest.mark.filterwarnings("ignore")  # what the profiler has to say about itself
def test_a_skin_waits_once(box):
    """The answer whether the candidates hold comes with the number of pairs."""
    positions, cell = box
    pbc = torch.tensor([True, False, True], device=positions.device)
    layer = diffnl.NeighborList(CUTOFF, skin=1.0)
    assert waits_of(lambda: layer(positions, cell, pbc)) == 1
    assert layer.searches == 1


@pytest.mark.filterwarnings("ignore")  # torch's own, about its matrix products
def test_compiled_to_graphs(gpu):
    """mode="reduce-overhead": torch captures what it has compiled."""
    torch._dynamo.reset()
    layer = diffnl.NeighborList(CUTOFF, capacity=CAPACITY)

    def energy(r, h):
        return energy_of(layer(r, h, True).vectors)

    compiled = torch.compile(energy, fullgraph=True, mode="reduce-overhead")
    positions, cell = scatter(90, cubic(11.0), 3).to(gpu), tensor(cubic(11.0)).to(gpu)
    for n in range(6):
        leaves = [t.requires_grad_() for t in moved(positions, cell, n)]
        ours = torch.autograd.grad(compiled(*leaves), leaves)
        for one, other in zip(ours, torch.autograd.grad(energy(*leaves), leaves), strict=True):
            torch.testing.assert_close(one, other)
