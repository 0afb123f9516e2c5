"""How the list lives in torch's autograd: what it saves, what it leaves alone, modes, hooks and threads."""

import gc
import weakref

import pytest
import torch
from compare import assert_same_bits, bits
from systems import SYSTEMS, cubic, scatter, tensor

import diffnl

CUTOFF = 5.0
wanted_inputs = pytest.mark.parametrize(
    "wanted", [(True, False), (False, True), (True, True)], ids=["r", "h", "rh"]
)


def system(device="cpu", positions_grad=True, cell_grad=True, name="batch_interleaved", dtype=torch.float64):
    positions, cell, pbc, system_idx = SYSTEMS[name].arguments(dtype, device)
    return positions.requires_grad_(positions_grad), cell.requires_grad_(cell_grad), pbc, system_idx


def find(arguments, **options):
    positions, cell, pbc, system_idx = arguments
    return diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF, system_idx, **options)


def random_like(v, seed=60):
    return torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=v.dtype).to(v.device)


# ----- what is saved, and what is computed -----------------------------------------------------------------


def saved_by(function):
    """Every tensor that the graph built by `function` keeps for its backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    assert result.requires_grad
    return kept


@wanted_inputs
@pytest.mark.parametrize("source", ["list", "vectors"])
def test_only_integers_are_saved(source, wanted, device, gpu_kernels):
    arguments = positions, cell, _, system_idx = system(device, *wanted)
    mapping, shifts, _ = find(arguments)

    def build():
        if source == "list":
            return find(arguments).vectors
        return diffnl.pair_vectors(positions, cell, mapping, shifts, system_idx)

    kept = saved_by(build)
    assert kept and not any(t.is_floating_point() for t in kept), [t.dtype for t in kept]
    if source == "list" and gpu_kernels:
        return  # keeps a form of its own: see the next test
    count = mapping.shape[1]
    sizes = [tuple(t.shape) for t in kept]
    assert sizes.count((2, count)) == 1
    assert sizes.count((count, 3)) == (1 if wanted[1] else 0), "shifts are for the gradient of the cell alone"
    assert len(kept) <= (3 if wanted[1] else 1)


@wanted_inputs
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_what_is_saved_besides_inputs_and_outputs(full, wanted, device, gpu_kernels):
    """Nothing by the CPU backend; on a GPU at most 8 bytes a pair, and a few an atom. There a list may have
    64 kB or an eighth more memory than it needs."""
    arguments = system(device, *wanted, name="bulk")
    lists = []

    def build():
        lists.append(find(arguments, full=full))
        return lists[0].vectors

    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_by(build)}
    (pairs,) = lists
    known = {t.untyped_storage().data_ptr() for t in (*arguments, *pairs) if t is not None}
    extra = sum(size for pointer, size in kept.items() if pointer not in known)
    needed = 8 * pairs.mapping.shape[1] + 64 * len(arguments[0])
    assert extra <= (max(needed + 2**16, 1.125 * needed) if gpu_kernels else 0)
    assert needed + 2**16 < 28 * pairs.mapping.shape[1], "the mapping and the shifts would be noticed"


def test_nothing_is_saved_without_a_gradient(device):
    arguments = system(device, False, False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert not find(arguments).vectors.requires_grad
    assert kept == []


def test_the_graph_does_not_outlive_its_result(device):
    arguments = system(device)
    pairs = find(arguments)
    mapping = weakref.ref(pairs.mapping)
    pairs.distances.sum().backward()
    del pairs
    gc.collect()
    assert mapping() is None


@wanted_inputs
def test_inputs_that_need_no_gradient_get_none(wanted, device):
    positions, cell, _, _ = arguments = system(device, *wanted)
    find(arguments).vectors.square().sum().backward()
    assert (positions.grad is not None, cell.grad is not None) == wanted


def test_mapping_and_shifts_are_not_differentiable(device):
    pairs = find(system(device))
    assert pairs.vectors.requires_grad and not pairs.mapping.requires_grad and not pairs.shifts.requires_grad


def test_gradients_where_there_are_no_pairs(dtype, device):
    positions = torch.zeros(2, 3, dtype=dtype, device=device)
    positions[1] = 100.0
    cell = torch.eye(3, dtype=dtype, device=device) * 50
    for n in (0, 1, 2):
        r, h = positions[:n].clone().requires_grad_(), cell.clone().requires_grad_()
        pairs = diffnl.neighbor_pairs(r, h, False, 1.0)
        (pairs.vectors.sum() + pairs.distances.sum()).backward()
        assert torch.equal(r.grad, torch.zeros_like(r)) and torch.equal(h.grad, torch.zeros_like(h))


# ----- what is left alone ----------------------------------------------------------------------------------


def test_the_callers_tensors_are_unchanged(device):
    positions, cell, pbc, system_idx = arguments = system(device)
    before = [t.detach().clone() for t in arguments]
    versions = [t._version for t in arguments]
    pairs = find(arguments)
    listed = [t.detach().clone() for t in pairs]
    g = random_like(pairs.vectors).requires_grad_()
    kept = g.detach().clone()
    first = torch.autograd.grad(pairs.vectors, (positions, cell), g, create_graph=True)
    torch.autograd.grad(sum(x.square().sum() for x in first), g)
    again = diffnl.pair_vectors(positions, cell, pairs.mapping, pairs.shifts, system_idx)
    torch.autograd.grad(again, (positions, cell), g)
    assert torch.equal(g, kept)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(pairs, listed, strict=True))
    assert [t._version for t in arguments] == versions


def test_results_share_no_memory_with_inputs_or_later_calls(device):
    arguments = system(device, False, False)
    first = find(arguments)
    kept = [t.clone() for t in first]
    find(arguments, full=False)
    arguments[0].add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


# ----- upstream gradients of every kind --------------------------------------------------------------------


def test_upstream_gradients_may_have_any_strides(dtype, device):
    positions, cell, _, _ = arguments = system(device, dtype=dtype)
    v = find(arguments).vectors
    g = random_like(v)
    expected = torch.autograd.grad(v, (positions, cell), g, retain_graph=True)
    wide = torch.zeros(v.shape[0], 7, dtype=dtype, device=device)
    wide[:, 1:4] = g
    odd = {
        "transposed": g.T.contiguous().T,
        "sliced": wide[:, 1:4],
        "every second row": g.repeat_interleave(2, dim=0)[::2],
        "reversed twice": g.flip(0).flip(0),
    }
    for name, gradient in odd.items():
        assert torch.equal(gradient, g)
        ours = torch.autograd.grad(v, (positions, cell), gradient, retain_graph=True)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, expected, strict=True)), name


def test_expanded_upstream_gradients(device):
    positions, cell, _, _ = arguments = system(device)
    v = find(arguments).vectors
    expanded = torch.autograd.grad(v.sum(), (positions, cell), retain_graph=True)
    dense = torch.autograd.grad(v, (positions, cell), torch.ones_like(v))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(expanded, dense, strict=True))


def test_a_column_or_a_slice_of_the_vectors(device):
    positions, cell, _, _ = arguments = system(device)
    v = find(arguments).vectors
    weights = torch.zeros_like(v)
    weights[3:9, 1] = 1.0
    ours = torch.autograd.grad(v[3:9, 1].sum(), (positions, cell), retain_graph=True)
    expected = torch.autograd.grad(v, (positions, cell), weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# ----- modes, hooks, graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode, device):
    arguments = system(device)
    with mode():
        quiet = find(arguments)
        again = diffnl.pair_vectors(*arguments[:2], quiet.mapping, quiet.shifts, arguments[3])
        assert not quiet.vectors.requires_grad and not again.requires_grad
        assert quiet.vectors.is_inference() == (mode is torch.inference_mode)
    assert_same_bits(quiet, find(arguments))
    assert torch.equal(bits(again), bits(quiet.vectors))


def test_a_list_found_without_gradients_serves_later_ones(device):
    """Search once without a graph, then differentiate vectors of the list: what a skin or a trainer does."""
    positions, cell, _, system_idx = arguments = system(device)
    with torch.no_grad():
        mapping, shifts, _ = find(arguments)
    again = diffnl.pair_vectors(positions, cell, mapping, shifts, system_idx)
    ours = torch.autograd.grad(again.square().sum(), (positions, cell))
    expected = torch.autograd.grad(find(arguments).vectors.square().sum(), (positions, cell))
    # Not by their bits: a search may have kept a form of the list that adds up in another order.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_retain_graph_and_its_absence(device):
    positions, _, _, _ = arguments = system(device)
    energy = find(arguments).vectors.square().sum()
    (first,) = torch.autograd.grad(energy, positions, retain_graph=True)
    (second,) = torch.autograd.grad(energy, positions)
    assert torch.equal(bits(first), bits(second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(energy, positions)


def test_hooks_on_tensors_see_and_change_gradients(device):
    positions, cell, _, _ = arguments = system(device)
    pairs = find(arguments)
    seen = []
    positions.register_hook(lambda g: seen.append("positions"))
    cell.register_hook(lambda g: seen.append("cell"))
    pairs.vectors.register_hook(lambda g: 2 * g)
    pairs.vectors.sum().backward()
    ones = torch.ones_like(pairs.vectors)
    expected = torch.autograd.grad(find(arguments).vectors, (positions, cell), 2 * ones)
    torch.testing.assert_close((positions.grad, cell.grad), expected)
    assert sorted(seen[:2]) == ["cell", "positions"]


def test_hooks_on_the_module(device):
    positions, cell, pbc, system_idx = system(device)
    layer = diffnl.NeighborList(CUTOFF)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    layer.register_full_backward_hook(lambda module, into, out: seen.append([g is not None for g in out]))
    layer(positions, cell, pbc, system_idx).vectors.square().sum().backward()
    assert seen == [diffnl.Pairs, [False, False, True]]


def test_checkpointing(device):
    positions, cell, pbc, system_idx = arguments = system(device)

    def energy(r, h):
        return diffnl.neighbor_pairs(r, h, pbc, CUTOFF, system_idx).vectors.square().sum()

    value = torch.utils.checkpoint.checkpoint(energy, positions, cell, use_reentrant=False)
    ours = torch.autograd.grad(value, (positions, cell))
    expected = torch.autograd.grad(find(arguments).vectors.square().sum(), (positions, cell))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, expected, strict=True))


def test_a_gradient_of_the_list_does_not_reach_through_detach(device):
    positions, cell, _, _ = arguments = system(device)
    energy = find(arguments).vectors.detach().square().sum() + positions.sum()
    (gradient,) = torch.autograd.grad(energy, positions)
    assert torch.equal(gradient, torch.ones_like(positions))


# ----- threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["as_listed", "any_order"])
def test_adjoint_has_the_same_bits_on_any_number_of_threads(shuffle, full, dtype, threads, cpu_backend):
    cell = tensor(cubic(24.0)).to(dtype).requires_grad_()
    positions = scatter(1400, cubic(24.0), 61).to(dtype).requires_grad_()
    mapping, shifts, _ = diffnl.neighbor_pairs(positions, cell, True, 5.0, full=full)
    if shuffle:
        order = torch.randperm(mapping.shape[1], generator=torch.Generator().manual_seed(62))
        mapping, shifts = mapping[:, order], shifts[order]
    results = []
    for count in (1, 2, 3, 5, 2):
        threads(count)
        v = diffnl.pair_vectors(positions, cell, mapping, shifts)
        results.append((v, *torch.autograd.grad(v, (positions, cell), random_like(v))))
    for result in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(result, results[0], strict=True))


def test_adjoint_of_many_systems_has_the_same_bits_on_any_number_of_threads(dtype, threads, cpu_backend):
    generator = torch.Generator().manual_seed(63)
    owner = torch.randint(0, 300, (3000,), generator=generator)
    cell = (6 * torch.eye(3, dtype=dtype)).repeat(300, 1, 1).requires_grad_()
    positions = (6 * torch.rand(3000, 3, generator=generator, dtype=dtype)).requires_grad_()
    results = []
    for count in (1, 2, 3):
        threads(count)
        v = diffnl.neighbor_pairs(positions, cell, True, 3.0, owner).vectors
        results.append((v, *torch.autograd.grad(v, (positions, cell), random_like(v))))
    for result in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(result, results[0], strict=True))
