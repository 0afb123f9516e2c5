"""Derivatives of three orders, backward and forward, against numbers and against torch's own autograd."""

import pytest
import torch
from systems import TRICLINIC, cubic, scatter, tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import diffnl

CUTOFF = 3.5
both_lists = pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
inputs = pytest.mark.parametrize("wanted", ["positions", "cell", "both"])
batched = pytest.mark.parametrize("batch", [False, True], ids=["one_cell", "batch"])


def system(batch, device="cpu", wanted="none", dtype=torch.float64):
    """(positions, cell, system_idx): four atoms, or seven interleaved in three systems of which one is empty.

    No pair lies within 0.05 of the cutoff, so a numerical derivative does not meet the edge of the list.
    """
    owner, cell = None, tensor(TRICLINIC)
    positions = scatter(7 if batch else 4, TRICLINIC, 58, -1.0, 2.0)
    if batch:
        owner = torch.tensor([2, 0, 0, 2, 0, 2, 2])
        cell = torch.stack([cell, tensor(cubic(4.0)), 0.8 * cell.flip(1)])
    distances = diffnl.reference.neighbor_pairs(positions, cell, True, CUTOFF + 0.05, owner).distances
    assert len(distances) > 10 and (distances < CUTOFF - 0.05).all()
    owner = None if owner is None else owner.to(device)
    positions = positions.to(device, dtype).requires_grad_(wanted in ("positions", "both"))
    cell = cell.to(device, dtype).requires_grad_(wanted in ("cell", "both"))
    return positions, cell, owner


def energy_of(vectors):
    """A smooth scalar with non-trivial derivatives of every order."""
    return (1.0 / (1.0 + vectors.square().sum(-1))).sum() + (
        vectors[:, 0] * vectors[:, 1] * vectors[:, 2]
    ).sum()


def assert_close(ours, plain, **tolerances):
    """The oracle runs on the CPU, whatever the device under test."""
    torch.testing.assert_close(ours, plain, check_device=False, **tolerances)


def listed(positions, cell, owner, full=True, reference=False):
    search = diffnl.reference.neighbor_pairs if reference else diffnl.neighbor_pairs
    return search(positions, cell, True, CUTOFF, owner, full=full, sorted=True)


# ----- against finite differences --------------------------------------------------------------------------


@inputs
@batched
@both_lists
@pytest.mark.parametrize("source", ["list", "vectors"])
def test_gradcheck_and_gradgradcheck(source, full, batch, wanted, device):
    positions, cell, owner = system(batch, device, wanted)
    pairs = listed(positions.detach(), cell.detach(), owner, full)

    def vectors(positions, cell):
        if source == "list":
            return listed(positions, cell, owner, full).vectors
        return diffnl.pair_vectors(positions, cell, pairs.mapping, pairs.shifts, owner)

    def squares(positions, cell):  # v is linear: its own second derivative checks only that zero is zero
        return vectors(positions, cell).square().sum(1)

    forward = {"check_forward_ad": True, "check_batched_grad": True}
    assert gradcheck(vectors, (positions, cell), **forward, check_batched_forward_grad=True)
    assert gradgradcheck(vectors, (positions, cell))
    assert gradgradcheck(squares, (positions, cell), check_fwd_over_rev=True, check_rev_over_rev=True)


@both_lists
def test_gradcheck_without_a_cell(full, device):
    positions = scatter(5, cubic(3.0), 51).to(device).requires_grad_()
    assert gradcheck(lambda r: diffnl.neighbor_pairs(r, None, None, 9.0, full=full).vectors, positions)
    mapping, shifts, _ = diffnl.neighbor_pairs(positions.detach(), None, None, 9.0, full=full)
    assert gradcheck(lambda r: diffnl.pair_vectors(r, None, mapping, shifts), positions)
    assert gradgradcheck(lambda r: diffnl.pair_vectors(r, None, mapping, shifts).square(), positions)


def test_gradcheck_of_the_adjoint(device):
    """The second derivative is the first derivative of the adjoint, in its own argument too."""
    positions, cell, owner = system(True, device, "both")
    v = listed(positions, cell, owner).vectors
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(52), dtype=v.dtype).to(device)

    def adjoint(g):
        return torch.autograd.grad(v, (positions, cell), g, create_graph=True)

    assert gradcheck(adjoint, weights.requires_grad_(), check_batched_grad=True)
    assert gradgradcheck(lambda g: [x.square() for x in adjoint(g)], weights)


@batched
def test_gradients_of_distances(batch, device):
    positions, cell, owner = system(batch, device, "both")
    assert gradcheck(lambda r, h: listed(r, h, owner).distances, (positions, cell))
    assert gradgradcheck(lambda r, h: listed(r, h, owner).distances, (positions, cell))


# ----- against torch's own autograd ------------------------------------------------------------------------


def derivatives(positions, cell, owner, full, reference, order):
    """[E, then the gradient of E, of a contraction of it, and so on, `order` times], all flat."""
    inputs = [x for x in (positions, cell) if x.requires_grad]
    value = energy_of(listed(positions, cell, owner, full, reference).vectors)
    results = [value]
    for n in range(order):
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        results += gradients
        weights = [
            torch.linspace(-1.0, 1.0 + n, g.numel(), device=g.device, dtype=g.dtype) for g in gradients
        ]
        value = sum((g.flatten() * w).sum() for g, w in zip(gradients, weights, strict=True))
    return results


@inputs
@batched
@both_lists
def test_three_orders_equal_plain_torch(full, batch, wanted, device):
    ours = derivatives(*system(batch, device, wanted), full, False, order=3)
    plain = derivatives(*system(batch, "cpu", wanted), full, True, order=3)
    assert_close(ours, plain, rtol=1e-11, atol=1e-11)


def test_float32_gradients_equal_plain_torch(device):
    ours = derivatives(*system(True, device, "both", torch.float32), True, False, order=2)
    plain = derivatives(*system(True, "cpu", "both", torch.float64), True, True, order=2)
    for x, y in zip(ours, plain, strict=True):
        assert x.dtype == torch.float32
        assert_close(x.double(), y, rtol=2e-4, atol=2e-4)


@batched
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "fwd_over_rev", "rev_over_fwd"])
def test_torch_func_equals_plain_torch(transform, batch, device):
    positions, cell, owner = system(batch, device)
    func = torch.func
    both = {"argnums": (0, 1)}
    apply = {
        "grad": lambda f: func.grad(f, **both),
        "jacrev": lambda f: func.jacrev(func.grad(f, **both), **both),
        "jacfwd": lambda f: func.jacfwd(f, **both),
        "hessian": lambda f: func.hessian(f, **both),
        "fwd_over_rev": lambda f: func.jacfwd(func.grad(f, **both), **both),
        "rev_over_fwd": lambda f: func.jacrev(func.jacfwd(f, **both), **both),
    }[transform]
    ours = apply(lambda r, h: energy_of(listed(r, h, owner).vectors))(positions, cell)
    positions, cell, owner = system(batch)
    plain = apply(lambda r, h: energy_of(listed(r, h, owner, reference=True).vectors))(positions, cell)
    assert_close(ours, plain, rtol=1e-11, atol=1e-11)


@batched
def test_vjp_and_jvp_equal_plain_torch(batch, device):
    results = []
    for reference, where in ((False, device), (True, "cpu")):
        positions, cell, owner = system(batch, where)
        slopes = torch.linspace(0, 1, cell.numel(), dtype=cell.dtype).to(where).view_as(cell)

        def vectors(r, h, reference=reference, owner=owner):
            return listed(r, h, owner, reference=reference).vectors

        v, pull = torch.func.vjp(vectors, positions, cell)
        tangents = (torch.ones_like(positions), slopes)
        results.append((pull(v), torch.func.jvp(vectors, (positions, cell), tangents)))
    assert_close(*results, rtol=1e-12, atol=1e-12)


@batched
def test_vmap_over_tangents(batch, device):
    positions, cell, owner = system(batch, device)
    generator = torch.Generator().manual_seed(53)
    dr = torch.randn((5, *positions.shape), generator=generator, dtype=torch.float64).to(device)
    dh = torch.randn((5, *cell.shape), generator=generator, dtype=torch.float64).to(device)

    def push(dr, dh):
        return torch.func.jvp(lambda r, h: listed(r, h, owner).vectors, (positions, cell), (dr, dh))[1]

    expected = torch.stack([push(a, b) for a, b in zip(dr, dh, strict=True)])
    torch.testing.assert_close(torch.func.vmap(push)(dr, dh), expected)
    v, pull = torch.func.vjp(lambda r, h: listed(r, h, owner).vectors, positions, cell)
    weights = torch.randn((5, *v.shape), generator=generator, dtype=torch.float64).to(device)
    stacked = [torch.stack(column) for column in zip(*map(pull, weights), strict=True)]
    torch.testing.assert_close(list(torch.func.vmap(pull)(weights)), stacked)


@batched
@pytest.mark.parametrize(
    "strategy, vectorize", [("reverse-mode", False), ("reverse-mode", True), ("forward-mode", True)]
)
def test_torch_autograd_functional(strategy, vectorize, batch, device):
    positions, cell, owner = system(batch, device)
    functional = torch.autograd.functional

    def ours(r, h):
        return energy_of(listed(r, h, owner).vectors)

    *here, owner_here = system(batch)

    def plain(r, h):
        return energy_of(listed(r, h, owner_here, reference=True).vectors)

    assert_close(
        functional.jacobian(ours, (positions, cell), vectorize=vectorize, strategy=strategy),
        functional.jacobian(plain, tuple(here)),
    )
    assert_close(
        functional.hessian(ours, (positions, cell), vectorize=vectorize, outer_jacobian_strategy=strategy),
        functional.hessian(plain, tuple(here)),
    )


@inputs
def test_dual_numbers(wanted, device):
    results = []
    for reference, where in ((False, device), (True, "cpu")):
        positions, cell, owner = system(True, where)
        with forward_ad.dual_level():
            r, h = positions, cell
            if wanted != "cell":
                r = forward_ad.make_dual(positions, positions.cos())
            if wanted != "positions":
                h = forward_ad.make_dual(cell, cell.sin())
            pairs = listed(r, h, owner, reference=reference)
            assert forward_ad.unpack_dual(pairs.shifts).tangent is None
            results.append(forward_ad.unpack_dual(pairs.vectors).tangent)
    assert_close(*results, rtol=1e-12, atol=1e-12)


def test_an_external_list_in_any_order_has_the_same_gradients(device):
    positions, cell, owner = system(True, device, "both")
    pairs = listed(positions, cell, owner)
    generator = torch.Generator().manual_seed(54)
    shuffled = torch.randperm(pairs.mapping.shape[1], generator=generator)
    twice = torch.cat([shuffled, shuffled[:5]])  # a pair may be listed twice
    there = twice.to(device)
    ours = diffnl.pair_vectors(positions, cell, pairs.mapping[:, there], pairs.shifts[there], owner)
    assert torch.equal(ours, pairs.vectors[there])
    g = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
    here = system(True, "cpu", "both")
    plain = listed(*here, reference=True).vectors[twice]
    assert_close(
        torch.autograd.grad(ours, (positions, cell), g.to(device)),
        torch.autograd.grad(plain, here[:2], g),
        rtol=1e-12,
        atol=1e-12,
    )


# ----- distances where v = 0 -------------------------------------------------------------------------------


def test_distance_zero_has_zero_first_and_second_derivatives(dtype, device):
    positions = torch.ones(2, 3, dtype=dtype, device=device, requires_grad=True)
    pairs = diffnl.neighbor_pairs(positions, None, None, 1.0)
    assert pairs.distances.tolist() == [0.0, 0.0]
    (first,) = torch.autograd.grad(pairs.distances.sum(), positions, create_graph=True)
    assert torch.equal(first, torch.zeros_like(first))
    (second,) = torch.autograd.grad(first.sum() + first.square().sum(), positions)
    assert torch.equal(second, torch.zeros_like(second))


def test_hessian_of_distances_with_a_coincident_pair(device):
    """A zero distance among others: torch.func agrees with the sum over the other pairs alone."""
    positions = scatter(4, cubic(2.0), 55).to(device)
    positions[3] = positions[0]

    def ours(r):
        return diffnl.neighbor_pairs(r, None, None, 9.0).distances.sum()

    def plain(r):
        v = r[None] - r[:, None]
        apart = (v.detach() != 0).any(-1)
        return torch.linalg.vector_norm(v[apart], dim=-1).sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev):
        torch.testing.assert_close(transform(ours)(positions), transform(plain)(positions))


def test_distances_are_not_stale(device):
    positions, cell, owner = system(False, device, "both")
    pairs = listed(positions, cell, owner)
    with torch.no_grad():
        assert not pairs.distances.requires_grad
    assert pairs.distances.requires_grad, "what no_grad computed must not be served with gradients on"
    kept = pairs._replace(vectors=2 * pairs.vectors)
    assert torch.equal(kept.distances, 2 * pairs.distances)
    with torch.inference_mode():
        assert listed(positions, cell, owner).distances.is_inference()


def test_distances_of_inference_mode_are_not_kept_for_later(device):
    positions, cell, owner = system(False, device, "both")
    pairs = listed(positions, cell, owner)
    with torch.inference_mode():
        pairs.distances.sum()
    pairs.distances.sum().backward()
    assert positions.grad is not None and not pairs.distances.is_inference()
