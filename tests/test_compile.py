"""torch.compile and make_fx: one graph, compiled once, with the values of eager mode."""

import pytest
import torch
from conftest import EMULATED
from systems import cubic, scatter, tensor
from torch.fx.experimental.proxy_tensor import make_fx

import diffnl

CUTOFF = 4.0
TRACES_AUTOGRAD = hasattr(torch._dynamo.config, "trace_autograd_ops")
needs_autograd_ops = pytest.mark.skipif(
    not TRACES_AUTOGRAD, reason="this torch compiles no torch.autograd.grad: see docs/compile.md"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in what it generates


class Potential(torch.nn.Module):
    """A pair potential with a smooth envelope, which makes nothing of padding."""

    def __init__(self, **options):
        super().__init__()
        self.neighbors = diffnl.NeighborList(CUTOFF, **options)
        self.strength = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, positions, cell, pbc=True, system_idx=None):
        pairs = self.neighbors(positions, cell, pbc, system_idx)
        envelope = (1.0 - pairs.distances / CUTOFF).clamp(min=0.0).pow(3)
        return self.strength * (envelope * torch.exp(-pairs.distances)).sum()


def with_derivatives(potential):
    def run(positions, cell, *rest):
        energy = potential(positions, cell, *rest)
        return energy.detach(), *diffnl.forces_and_stress(energy, positions, cell)

    return run


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled code from other tests; autograd inside a graph, where torch has it."""
    torch._dynamo.reset()
    if not TRACES_AUTOGRAD:
        yield
        return
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def box(step=0, atoms=30):
    """Leaves of a box that is another one at each step."""
    edge = 8.0 + 0.1 * step
    positions = scatter(atoms, cubic(edge), 100 + step)
    return positions.requires_grad_(), tensor(cubic(edge)).requires_grad_()


def assert_same_values(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


LISTS = {
    "plain": {},
    "half": {"full": False},
    "sorted": {"sorted": True},
    "padded": {"capacity": 4_000},
    "padded_half": {"capacity": 4_000, "full": False},
    "skin": {"skin": 0.5},
}


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_energy(options):
    """Gradients are taken outside, of positions, cell and parameters."""
    potential = Potential(**options)
    compiled = torch.compile(potential, fullgraph=True, backend="aot_eager")
    for step in range(3):
        leaves = *box(step), potential.strength
        energy = compiled(*leaves[:2])
        expected = potential(*leaves[:2])
        assert_same_values((energy,), (expected,))
        assert_same_values(torch.autograd.grad(energy, leaves), torch.autograd.grad(expected, leaves))


@needs_autograd_ops
@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_energy_forces_and_stress(options):
    potential = Potential(**options)
    compiled = torch.compile(with_derivatives(potential), fullgraph=True, backend="aot_eager")
    for step in range(3):
        assert_same_values(compiled(*box(step)), with_derivatives(potential)(*box(step)))


@needs_autograd_ops
def test_no_recompile_when_the_number_of_pairs_changes():
    """20 of them, one graph, no break; energy, forces and stress through inductor."""
    run = with_derivatives(Potential())
    compiled = torch.compile(run, fullgraph=True)
    compiled(*box(0))
    counts = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(30):
            leaves = box(step)
            counts.add(diffnl.neighbor_pairs(*leaves, True, CUTOFF).shifts.shape[0])
            assert_same_values(compiled(*leaves), run(*leaves))
    assert len(counts) >= 20


@needs_autograd_ops
def test_no_recompile_when_the_number_of_atoms_changes():
    run = with_derivatives(Potential())
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*box(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 8):
            leaves = box(step, 30 + 5 * step)
            assert_same_values(compiled(*leaves), run(*leaves))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_list_that_exists(dtype):
    """Shifts of int64 are not looked at while they are traced; one that does not fit fails the run."""
    positions, cell = box()
    pairs = diffnl.neighbor_pairs(positions, cell, True, CUTOFF)
    shifts = pairs.shifts.to(dtype)
    compiled = torch.compile(diffnl.pair_vectors, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(positions, cell, pairs.mapping, shifts), pairs.vectors)
    if dtype == torch.int64 and not EMULATED:
        shifts[3, 1] = -(2**63)
        with pytest.raises(RuntimeError, match="out_of_range"):
            compiled(positions, cell, pairs.mapping, shifts)


def test_ok_of_a_padded_list():
    """In the graph, so that a compiled energy of a list that has failed is NaN."""
    neighbors = {capacity: diffnl.NeighborList(CUTOFF, capacity=capacity) for capacity in (0, 4_000)}

    def energy(positions, cell, capacity):
        pairs = neighbors[capacity](positions, cell, True)
        envelope = torch.where(pairs.distances < CUTOFF, (1.0 - pairs.distances / CUTOFF) ** 3, 0.0)
        return envelope.sum() * pairs.ok

    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    positions, cell = box()
    assert compiled(positions, cell, 0).isnan()
    assert_same_values((compiled(positions, cell, 4_000),), (energy(positions, cell, 4_000),))


def test_a_functional_gradient_says_what_to_do():
    """torch.func inside a graph does not reach the layer's operators. Around a break it does: same values."""
    neighbors = diffnl.NeighborList(CUTOFF)
    positions, cell = (leaf.detach() for leaf in box())

    def energy(positions):
        return neighbors(positions, cell, True).distances.cos().sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.autograd\.grad .* docs/compile\.md"):
        torch.compile(torch.func.grad(energy), fullgraph=True)(positions)
    with_breaks = torch.compile(torch.func.grad(energy))(positions)
    assert_same_values((with_breaks,), (torch.func.grad(energy)(positions),))


def test_a_batch():
    potential = Potential()
    compiled = torch.compile(potential, fullgraph=True, backend="aot_eager")
    positions, _ = box(atoms=40)
    cell = torch.stack([tensor(cubic(8.0)), tensor(cubic(8.5))]).requires_grad_()
    pbc = torch.tensor([[True, True, True], [True, False, True]])
    ours, theirs = (
        torch.autograd.grad(run(positions, cell, pbc, torch.arange(40) % 2), (positions, cell))
        for run in (compiled, potential)
    )
    assert_same_values(ours, theirs)


def batch_derivatives(potential):
    """Energy of each of two systems, forces and stresses."""

    def run(positions, cell, system_idx):
        pairs = potential.neighbors(positions, cell, True, system_idx)
        of_pair = (1.0 - pairs.distances / CUTOFF).clamp(min=0.0).pow(3)
        energy = of_pair.new_zeros(2).index_add(0, system_idx[pairs.mapping[0]], of_pair)
        return energy.detach(), *diffnl.forces_and_stress(energy, positions, cell, system_idx)

    return run


def batch():
    positions, _ = box(atoms=40)
    cell = torch.stack([tensor(cubic(8.0)), tensor(cubic(8.5))]).requires_grad_()
    return positions, cell, torch.arange(40) % 2


@needs_autograd_ops
def test_stresses_of_a_batch():
    run = batch_derivatives(Potential())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*batch()), run(*batch())
    assert theirs[2].shape == (2, 3, 3) and theirs[2].abs().amin(dim=(1, 2)).min() > 0
    assert_same_values(ours, theirs)


def test_make_fx_of_a_batch():
    run = batch_derivatives(Potential())
    traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*batch())
    assert_same_values(traced(*batch()), run(*batch()))


def test_several_cutoffs():
    """Gradients reach positions and cell through each list."""
    neighbors = diffnl.NeighborList((3.0, CUTOFF))

    def energy(positions, cell):
        short, long = neighbors(positions, cell, True)
        return (3.0 - short.distances).pow(3).sum() + 0.1 * (CUTOFF - long.distances).pow(3).sum()

    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    for step in range(3):
        leaves = box(step)
        ours, theirs = (torch.autograd.grad(run(*leaves), leaves) for run in (compiled, energy))
        assert_same_values(ours, theirs)


@needs_autograd_ops
@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_a_training_step(options):
    """The double backward: a loss on forces and stress, its gradient to parameters and inputs."""
    potential = Potential(**options)

    def loss(positions, cell):
        energy = potential(positions, cell)
        forces, stress = diffnl.forces_and_stress(energy, positions, cell, create_graph=True)
        return forces.square().sum() + stress.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = *box(), potential.strength
    ours, theirs = (torch.autograd.grad(f(*leaves[:2]), leaves) for f in (compiled, loss))
    assert_same_values(ours, theirs)


@pytest.mark.skipif(not TRACES_AUTOGRAD, reason="this torch has no such switch")
def test_what_torch_says_without_the_switch():
    """docs/compile.md tells what to do about it."""
    with torch._dynamo.config.patch(trace_autograd_ops=False):
        compiled = torch.compile(with_derivatives(Potential()), fullgraph=True, backend="aot_eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="trace_autograd_ops"):
            compiled(*box())


@needs_autograd_ops
def test_what_torch_says_of_an_energy_that_is_not_detached():
    """Its graph has gone into the forces."""

    def run(positions, cell):
        energy = potential(positions, cell)
        return energy, *torch.autograd.grad(energy, (positions, cell))

    potential = Potential()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="consumes grad_fns that are needed by tensors returned"
    ):
        torch.compile(run, fullgraph=True, backend="aot_eager")(*box())


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("options", [{}, {"capacity": 4_000}], ids=["plain", "padded"])
def test_make_fx(options, mode):
    """NequIP's path: energy and forces traced on one input, run on others."""
    run = with_derivatives(Potential(**options))

    def detached(positions, cell):
        return run(positions.detach().requires_grad_(), cell.detach().requires_grad_())

    inputs = [t.detach() for t in box()]
    traced = make_fx(detached, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    assert any("diffnl" in str(node.target) for node in traced.graph.nodes)
    for step in range(3) if mode == "symbolic" or options else (0,):
        inputs = [t.detach() for t in box(step)]
        assert_same_values(traced(*inputs), detached(*inputs))


@pytest.mark.skipif(EMULATED, reason="of the CPU backend")
def test_eager_calls_do_not_meet_the_compiler_s_derivatives():
    """They would cost a trip through Python at every call."""
    positions, cell = box()
    pbc = torch.ones(3, dtype=torch.bool)
    raw = torch.ops.diffnl.neighbor_pairs.default(positions, cell, pbc, None, CUTOFF, True, False)
    assert raw[2].grad_fn is not None, "the operator has a derivative of its own"
    ours = diffnl._ops.neighbor_pairs(positions, cell, pbc, None, CUTOFF, True, False)
    assert ours[2].grad_fn is None
