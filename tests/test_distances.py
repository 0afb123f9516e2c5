"""`pairs.distances`: kept, but never stale; exact for every length the dtype holds."""

import pytest
import torch
from compare import bits
from torch.autograd import gradcheck, gradgradcheck

import diffnl
from diffnl.pairs import Pairs

R = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 1.5, 1.0]], dtype=torch.float64)


def pairs_of(vectors):
    """Pairs with these vectors (P, 3)."""
    count = vectors.shape[0]
    return Pairs(torch.zeros(2, count, dtype=torch.int64), torch.zeros(count, 3, dtype=torch.int32), vectors)


def plain(vectors):
    """sqrt((x² + y²) + z²) and no more."""
    return vectors.square().sum(-1).sqrt()


# ----- kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"capacity": 9}, {"full": False}, {"skin": 0.5}], ids=str)
def test_distances_follow_vectors_that_are_changed_in_place(options, device):
    pairs = diffnl.NeighborList(3.0, **options)(R.to(device))
    before = pairs.distances.clone()
    assert pairs.distances is pairs.distances
    pairs.vectors.mul_(2.0)
    assert torch.equal(pairs.distances, 2.0 * before)


def test_distances_that_are_changed_in_place_are_not_kept(device):
    pairs = diffnl.NeighborList(3.0)(R.to(device))
    before = pairs.distances.clone()
    pairs.distances.mul_(2.0)
    assert torch.equal(pairs.distances, before)


def test_distances_follow_vectors_changed_in_inference_mode(device):
    """Where tensors count no changes, nothing is kept."""
    with torch.inference_mode():
        pairs = diffnl.NeighborList(3.0)(R.to(device))
        before = pairs.distances.clone()
        pairs.vectors.mul_(2.0)
        assert torch.equal(pairs.distances, 2.0 * before)
        pairs = diffnl.NeighborList(3.0)(R.to(device))
        pairs.distances.mul_(2.0)
        assert torch.equal(pairs.distances, before)


# ----- lengths whose squares leave the dtype ---------------------------------------------------------------


def powers_of_two(dtype):
    """Vectors (K, 3) of length 3 * 2**k for every k that leaves the components normal, and these 2**k."""
    info = torch.finfo(dtype)
    scales = [1.0]
    while scales[-1] > 2 * info.tiny:
        scales.append(scales[-1] / 2)
    while scales[0] < info.max / 16:
        scales.insert(0, scales[0] * 2)
    scales = torch.tensor(scales, dtype=dtype)
    return scales[:, None] * torch.tensor([1.0, -2.0, 2.0], dtype=dtype), scales


def test_every_length_is_exact(device, dtype):
    """1e-23 and 1e25 in float32 among them: their squares are 0 and infinite."""
    vectors, scales = powers_of_two(dtype)
    assert (plain(vectors) == 0).any() and plain(vectors).isinf().any()
    assert torch.equal(pairs_of(vectors.to(device)).distances.cpu(), 3.0 * scales)


def test_subnormal_lengths_are_not_zero(device, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    vectors = smallest * torch.tensor([[3.0, 0.0, -4.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    distances = pairs_of(vectors.to(device)).distances.cpu()  # a GPU divides by multiplying with 1 / smallest
    assert (distances / smallest).tolist() == [5.0, 1.0, 0.0]


def test_the_slope_of_every_length(device, dtype):
    """v / |v|, by reverse and forward mode; 0 where v = 0, beside lengths of all sizes."""
    vectors, _ = powers_of_two(dtype)
    vectors = torch.cat([vectors, torch.zeros(1, 3, dtype=dtype)]).to(device)
    expected = torch.tensor([[1.0, -2.0, 2.0]], dtype=dtype, device=device).expand_as(vectors[1:]) / 3.0
    slope = torch.func.grad(lambda v: pairs_of(v).distances.sum())(vectors)
    torch.testing.assert_close(slope[:-1], expected)
    assert (slope[-1] == 0).all()
    leaf = vectors.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(pairs_of(leaf).distances.sum(), leaf)[0], slope)
    _, tangent = torch.func.jvp(lambda v: pairs_of(v).distances, (vectors,), (torch.ones_like(vectors),))
    torch.testing.assert_close(tangent, slope.sum(1))


def test_bits_of_ordinary_lengths(device, dtype):
    """Those of plain torch, forward, backward and second derivatives, whatever else is in the list."""
    generator = torch.Generator().manual_seed(7)
    ordinary = torch.randn(1000, 3, generator=generator, dtype=dtype).to(device)
    ordinary = ordinary * torch.logspace(-12, 12, 1000, dtype=dtype, device=device)[:, None]
    weights = torch.randn(1000, 3, generator=generator, dtype=dtype).to(device)
    extreme = torch.tensor(
        [[0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [1e30, 1e30, 0.0]], dtype=dtype, device=device
    )

    def derivatives(norm, vectors):
        leaf = vectors.clone().requires_grad_()
        length = norm(leaf)[:1000]
        (first,) = torch.autograd.grad(torch.log1p(length).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first[:1000] * weights).sum(), leaf)
        return length, first[:1000], second[:1000]

    expected = derivatives(plain, ordinary)
    for vectors in (ordinary, torch.cat([ordinary, extreme])):
        found = derivatives(lambda v: pairs_of(v).distances, vectors)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("size", [1.0, 1e-300, 1e250], ids=str)
def test_derivatives_of_scaled_lengths(size, device):
    """The scale is a constant to them: size * |v| / size, of short and long vectors, has those of |v|."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(4, 3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    # Beside a vector of the other kind, so that every length takes the same way.
    other = torch.zeros(1, 3, dtype=torch.float64, device=device)

    def lengths(v):
        return pairs_of(torch.cat([size * v, other])).distances / size

    assert gradcheck(lengths, (vectors,), check_forward_ad=True)
    assert gradgradcheck(lengths, (vectors,))


def test_lengths_that_are_not_finite(device, dtype):
    vectors = torch.tensor([[torch.nan, 0.0, 0.0], [0.0, torch.inf, 0.0], [3.0, 4.0, 0.0]], dtype=dtype)
    distances = pairs_of(vectors.to(device)).distances
    assert distances[0].isnan() and distances[1].isinf() and distances[2] == 5.0
