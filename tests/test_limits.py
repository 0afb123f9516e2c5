"""Sizes that no test can have in earnest, faked; and what a GPU's runtime may report at any time.

Where an emulator runs the GPU kernels (tests/hostgpu), the environment sets its limits and failures.
"""

import contextlib
import ctypes

import pytest
import torch
from compare import assert_equal_bits, assert_same_bits
from systems import cubic, scatter, tensor

import diffnl
from diffnl import _ops, _validate

CUTOFF = 4.0


@pytest.fixture
def emulator(monkeypatch):
    """Sets a variable of the emulator."""
    if diffnl.build_info()["backends"] != ["hostgpu"]:
        pytest.skip("sets the limits of an emulated GPU")
    yield lambda name, value: monkeypatch.setenv(f"HOSTGPU_{name}", str(value))
    monkeypatch.setenv("HOSTGPU_FAULT", "")


def box(device, num_atoms=300):
    """Ten or so pairs an atom."""
    edge = cubic((20.0 * num_atoms) ** (1 / 3))
    positions = scatter(num_atoms, edge, 7).to(device)
    return positions, tensor(edge).to(device), torch.ones(3, dtype=torch.bool, device=device)


# ----- launches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_a_search_in_launches_of_few_threads(full, emulator, device):
    """An AMD GPU counts the threads of a launch in 32 bits: blocks take what is left in turns."""
    where = box(device)
    options = {"full": full}
    capacity = diffnl.estimate_capacity(*where, CUTOFF, full=full, skin=0.5)

    def lists():
        layer = diffnl.NeighborList(CUTOFF, skin=0.5, **options)
        padded = diffnl.NeighborList(CUTOFF, skin=0.5, capacity=capacity, **options)
        found = [diffnl.neighbor_pairs(*where, CUTOFF, **options), layer(*where), layer(*where)]
        found += [padded(*where), padded(*where), diffnl.neighbor_pairs(*where, CUTOFF, capacity=capacity)]
        return found

    expected = lists()
    emulator("MOST_THREADS", 2048)
    for ours, theirs in zip(lists(), expected, strict=True):
        assert_equal_bits(tuple(ours)[:3], tuple(theirs)[:3])


def test_vectors_of_links_in_launches_of_few_threads(emulator, device):
    positions, cell, pbc = box(device)
    positions.requires_grad_()
    vectors = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF).vectors
    weights = torch.ones_like(vectors).requires_grad_()
    (gradient,) = torch.autograd.grad(vectors, positions, weights, create_graph=True)
    again = [torch.autograd.grad(gradient, weights, positions.detach(), retain_graph=True)[0]]
    emulator("MOST_THREADS", 2048)
    again.append(torch.autograd.grad(gradient, weights, positions.detach())[0])
    assert torch.equal(*again) and again[0].abs().max() > 0


def test_a_launch_that_does_not_fit(emulator, device):
    positions, cell, pbc = box(device)
    mapping, shifts, vectors = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF)
    emulator("MOST_THREADS", 1024)
    with pytest.raises(
        RuntimeError, match=r"kernel `vectors_of_mapping<T>` takes \d+ blocks, and this device 4"
    ):
        diffnl.pair_vectors(positions, cell, mapping, shifts)
    emulator("MOST_THREADS", 2**32 - 1)
    assert torch.equal(diffnl.pair_vectors(positions, cell, mapping, shifts), vectors)


# ----- errors of a GPU's runtime ---------------------------------------------------------------------------

EARLIER = "was not launched: an earlier GPU operation of this program had failed: "


def test_an_error_that_was_there_before(emulator, device):
    """Another library's error, which nobody had asked for: told as what it is, and once."""
    where = box(device)
    expected = diffnl.neighbor_pairs(*where, CUTOFF)
    emulator("FAULT", "earlier")
    with pytest.raises(RuntimeError, match=EARLIER + "invalid argument"):
        diffnl.neighbor_pairs(*where, CUTOFF)
    assert_same_bits(diffnl.neighbor_pairs(*where, CUTOFF), expected)


def test_an_error_that_was_there_before_on_a_gpu(gpu):
    """HIP's runtime is torch's. Of CUDA's diffnl has a copy of its own, which knows of no other's errors."""
    positions, cell, pbc = box(gpu)
    mapping, shifts, vectors = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF)
    torch.cuda.synchronize()
    assert int(torch.cuda.cudart().cudaHostUnregister(0)) != 0, "the call was to fail"
    if torch.version.hip:
        with pytest.raises(RuntimeError, match=EARLIER):
            diffnl.pair_vectors(positions, cell, mapping, shifts)
    again = diffnl.pair_vectors(positions, cell, mapping, shifts)
    with contextlib.suppress(RuntimeError):  # torch asks after its own next launch, and tells it once
        torch.ones(1, device=gpu).add_(1.0)
    assert torch.equal(again, vectors)


def test_work_that_is_not_ready_is_no_error(emulator, device):
    where = box(device)
    expected = diffnl.neighbor_pairs(*where, CUTOFF)
    emulator("FAULT", "busy")
    assert_same_bits(diffnl.neighbor_pairs(*where, CUTOFF), expected)


def list_with_a_skin(*where):
    return diffnl.NeighborList(CUTOFF, skin=0.5)(*where)


def list_without(*where):
    return diffnl.neighbor_pairs(*where, CUTOFF)


@pytest.mark.parametrize("find", [list_without, list_with_a_skin])
def test_an_error_while_the_device_counts(find, emulator, device):
    """The device writes the summary of a count to memory that the thread's next search uses: the stream is
    waited for, and what that says hides nothing."""
    where = box(device)
    expected = find(*where)
    emulator("FAULT", "hipEventRecord,hipStreamSynchronize")
    with pytest.raises(RuntimeError, match="hipEventRecord failed: invalid argument"):
        find(*where)
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    assert getenv(b"HOSTGPU_FAULT") == b"", "nobody has waited"
    assert_same_bits(find(*where), expected)


# ----- numbers of 32 bits ----------------------------------------------------------------------------------


def test_more_atoms_than_have_numbers(gpu_kernels, device):
    limit = 30 if gpu_kernels else 31
    positions = torch.zeros(1, 3, device=device).expand(2**limit, 3)
    with pytest.raises(RuntimeError, match=rf"`positions` must hold fewer than 2\*\*{limit} atoms"):
        diffnl.neighbor_pairs(positions, None, None, CUTOFF)


def test_more_systems_than_have_numbers(gpu_kernels, device):
    """On a GPU each has 32 slots in the table of bins."""
    limit = 26 if gpu_kernels else 31
    cell = torch.eye(3, device=device).expand(2**limit, 3, 3)
    positions, system_idx = torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=rf"`cell` must hold fewer than 2\*\*{limit} systems"):
        diffnl.neighbor_pairs(positions, cell, False, CUTOFF, system_idx)


def test_a_gradient_of_more_atoms_than_have_numbers(gpu_kernels, device):
    """Pairs are sorted by atoms as int32."""
    if not gpu_kernels:
        pytest.skip("the CPU backend sorts no pairs")
    mapping = torch.zeros((2, 1), dtype=torch.int64, device=device)
    shifts, grad = torch.zeros((1, 3), dtype=torch.int32, device=device), torch.ones((1, 3), device=device)
    with pytest.raises(RuntimeError, match=r"`positions` must hold fewer than 2\*\*31 atoms"):
        _ops.pair_vectors_adjoint(grad, mapping, shifts, None, 2**31, 1, True, False)


# ----- memory that is not there ----------------------------------------------------------------------------


def test_memory_for_more_atoms_than_there_could_be(cpu_backend):
    """422 TB."""
    mapping, grad = torch.zeros((2, 0), dtype=torch.int64, device="cpu"), torch.zeros(0, 3, device="cpu")
    with pytest.raises(torch.OutOfMemoryError, match=f"need a tensor of {12 * 2**45} bytes"):
        _ops.pair_vectors_adjoint(grad, mapping, None, None, 2**45, 1, True, False)


def test_what_is_not_a_lack_of_memory(monkeypatch):
    """Memory may be refused because an earlier kernel has failed: asked again, torch says so."""

    def refuse(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _validate.raise_memory_error(
            RuntimeError("diffnl: out_of_memory 1000 0"), torch.zeros(1, device="meta")
        )
