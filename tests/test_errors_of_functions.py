"""Bad input of vectors, energies and strains: every row of the contract's table, by type and text."""

import pytest
import torch
from refusals import BATCH, INDEX, H, R, call, changed, on, raises

import diffnl

LIST = dict(
    positions=R, cell=H, mapping=torch.tensor([[0, 1], [1, 2]]), shifts=torch.zeros(2, 3, dtype=torch.int32)
)
BAD_LISTS = {
    "mapping_shape": (
        dict(mapping=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        ["`mapping`", "(2, P)", "(2,)"],
    ),
    "mapping_rows": (dict(mapping=torch.zeros(3, 2).long()), ValueError, ["`mapping`", "(2, P)", "(3, 2)"]),
    "mapping_dtype": (dict(mapping=torch.zeros(2, 2)), TypeError, ["`mapping`", "integer", "torch.float32"]),
    "mapping_type": (dict(mapping=[[0], [1]]), TypeError, ["`mapping`", "Tensor", "list"]),
    "shifts_shape": (
        dict(shifts=torch.zeros(3, 3).int()),
        ValueError,
        ["`shifts`", "(P, 3)", "(2, 3)", "(3, 3)"],
    ),
    "shifts_dtype": (dict(shifts=torch.zeros(2, 3)), TypeError, ["`shifts`", "integer", "torch.float32"]),
    "positions_dtype": (
        dict(positions=R.half()),
        TypeError,
        ["`positions`", "float32 or float64", "torch.float16"],
    ),
    "cell_dtype": (dict(cell=H.double()), TypeError, ["`cell`", "torch.float32", "torch.float64"]),
    "system_idx_missing": (dict(cell=BATCH), ValueError, ["`system_idx`", "2 cells", "None"]),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_pair_vectors(name, device):
    arguments, error, text = BAD_LISTS[name]
    raises(error, text, diffnl.pair_vectors, **on(device, LIST | arguments))


OF_ONE_SYSTEM = torch.ones_like(INDEX)
BATCH_LIST = dict(cell=BATCH, system_idx=OF_ONE_SYSTEM)
SELVES = torch.tensor([[0, 1], [0, 1]])
NO_SHIFTS = torch.zeros(2, 3, dtype=torch.int64)
OUT_OF_RANGE = {
    "shifts_large": (
        dict(shifts=changed(NO_SHIFTS, (1, 2), 2**31)),
        ["`shifts`", "int32", "[0, 0, 2147483648]", "pair 1"],
    ),
    "shifts_small": (
        dict(shifts=changed(NO_SHIFTS, (0, 0), -(2**31) - 1)),
        ["`shifts`", "int32", "[-2147483649, 0, 0]", "pair 0"],
    ),
    "shifts_smallest": (
        dict(shifts=changed(NO_SHIFTS, (1, 1), -(2**63))),
        ["`shifts`", "int32", "[0, -9223372036854775808, 0]", "pair 1"],
    ),
    "mapping_large": (dict(mapping=torch.tensor([[0, 1], [1, 3]])), ["`mapping`", "[0, 3)", "3", "pair 1"]),
    "mapping_negative": (
        dict(mapping=torch.tensor([[-1, 1], [1, 2]])),
        ["`mapping`", "[0, 3)", "-1", "pair 0"],
    ),
    "mapping_huge": (
        dict(mapping=torch.tensor([[0, 1], [1, 2**62]])),
        ["`mapping`", "[0, 3)", str(2**62), "pair 1"],
    ),
    "mapping_beyond_int32": (
        dict(mapping=torch.tensor([[0, 2**32 + 1], [1, 2]])),
        ["`mapping`", "[0, 3)", str(2**32 + 1), "pair 1"],
    ),
    "mapping_large_of_a_batch": (
        BATCH_LIST | dict(mapping=torch.tensor([[0, 3], [1, 2]])),
        ["`mapping`", "[0, 3)", "3", "pair 1"],
    ),
    "system_idx_large": (
        dict(cell=BATCH, system_idx=changed(OF_ONE_SYSTEM, 1, 2), mapping=SELVES),
        ["`system_idx`", "[0, 2)", "2", "atom 1"],
    ),
    "system_idx_negative": (
        dict(cell=BATCH, system_idx=changed(OF_ONE_SYSTEM, 1, -1), mapping=SELVES),
        ["`system_idx`", "[0, 2)", "-1", "atom 1"],
    ),
    "system_idx_of_a_neighbor": (
        dict(cell=BATCH, system_idx=changed(OF_ONE_SYSTEM, 2, 7)),
        ["`system_idx`", "[0, 2)", "7", "atom 2"],
    ),
    "system_idx_of_a_neighbor_and_one_cell": (
        dict(system_idx=changed(0 * INDEX, 2, 7)),
        ["`system_idx`", "[0, 1)", "7", "atom 2"],
    ),
    "mapping_across_systems": (
        dict(cell=BATCH, system_idx=changed(OF_ONE_SYSTEM, 2, 0)),
        ["`mapping`", "of one system", "atom 1 with atom 2 of another"],
    ),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_pair_vectors_out_of_range(name, device, gpu_kernels):
    """An error; but on a GPU, where nobody waits for the kernel that could raise it, vectors that are NaN."""
    arguments, text = OUT_OF_RANGE[name]
    values = on(device, LIST | arguments)
    if raises_out_of_range(name, device, gpu_kernels):
        raises(ValueError, text, diffnl.pair_vectors, **values)
        return
    bad = out_of_range(**values)
    vectors = diffnl.pair_vectors(**values)
    assert bad.any() and not bad.all()
    assert vectors[bad].isnan().all() and vectors[~bad].isfinite().all()


def raises_out_of_range(name, device, gpu_kernels):
    """Shifts are looked at before a backend gets them, wherever that takes no wait."""
    return device.type == "cpu" if name.startswith("shifts") else not gpu_kernels


def out_of_range(positions, cell, mapping, shifts, system_idx=None):
    """(P,) whether a pair leads outside the tensors or its system, or its shift outside int32."""
    inside = (mapping >= 0) & (mapping < len(positions))
    shifts = shifts.long()  # a GPU compares int32 with 2**31 in int32
    inside = inside & ((shifts >= -(2**31)) & (shifts < 2**31)).all(1)
    if system_idx is not None:
        owner = system_idx[mapping.clamp(0, len(positions) - 1)]
        inside = inside & (owner >= 0) & (owner < cell.numel() // 9) & (owner[0] == owner[1])
    return ~inside.all(0)


@pytest.mark.parametrize("cell_grad", [False, True])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_the_backward_of_a_list_out_of_range(name, cell_grad, device, gpu_kernels):
    """Nothing is read or written elsewhere, and atoms that no bad pair names get their gradients."""
    if raises_out_of_range(name, device, gpu_kernels):
        pytest.skip("on the CPU such a list has no vectors to go back from")
    values = on(device, LIST | OUT_OF_RANGE[name][0])
    wanted = ["positions", "cell"] if cell_grad else ["positions"]
    for key in wanted:
        values[key] = values[key].clone().requires_grad_()
    vectors = diffnl.pair_vectors(**values)
    gradients = torch.autograd.grad(vectors, [values[key] for key in wanted], torch.ones_like(vectors))
    assert [g.shape for g in gradients] == [values[key].shape for key in wanted]
    bad, mapping = out_of_range(**values), values["mapping"]
    expected = torch.zeros_like(values["positions"]).detach()
    for row, sign in ((1, 1.0), (0, -1.0)):
        expected.index_add_(0, mapping[row, ~bad], torch.full_like(vectors[~bad], sign).detach())
    named = set(mapping[:, bad].flatten().tolist())
    others = [k for k in range(len(expected)) if k not in named]
    assert others and torch.equal(gradients[0][others], expected[others])


def energy_inputs(device):
    r, h = R.to(device, copy=True).requires_grad_(), H.to(device, copy=True).requires_grad_()
    return dict(energy=call(positions=r, cell=h).vectors.square().sum(), positions=r, cell=h)


BAD_ENERGIES = {
    "energy_shape": (
        dict(energy=torch.ones(2, requires_grad=True)),
        ValueError,
        ["`energy`", "()", "(B,)", "(2,)"],
    ),
    "energy_matrix": (
        dict(energy=torch.ones(1, 1, requires_grad=True)),
        ValueError,
        ["`energy`", "()", "(1, 1)"],
    ),
    "energy_without_graph": (dict(energy=torch.tensor(1.0)), ValueError, ["`energy`", "graph"]),
    "energy_number": (dict(energy=1.0), TypeError, ["`energy`", "Tensor", "float"]),
    "energy_number_no_cell": (dict(energy=1.0, cell=None), TypeError, ["`energy`", "Tensor", "float"]),
    "positions_without_grad": (dict(positions=R), ValueError, ["`positions`", "requires_grad=False"]),
    "cell_without_grad": (dict(cell=H), ValueError, ["`cell`", "requires_grad=False"]),
    "cell_dtype": (
        dict(cell=H.double().requires_grad_()),
        TypeError,
        ["`cell`", "torch.float32", "torch.float64"],
    ),
    "cell_type": (dict(cell=H.numpy()), TypeError, ["`cell`", "Tensor", "ndarray"]),
    "system_idx_shape": (dict(system_idx=INDEX[:2]), ValueError, ["`system_idx`", "(3,)", "(2,)"]),
    "system_idx_range": (dict(system_idx=INDEX), ValueError, ["`system_idx`", "[0, 1)", "1", "atom 1"]),
    "system_idx_range_batch": (
        dict(cell=BATCH.clone().requires_grad_(), system_idx=changed(INDEX, 1, 2)),
        ValueError,
        ["`system_idx`", "[0, 2)", "2", "atom 1"],
    ),
}


@pytest.mark.parametrize("name", BAD_ENERGIES)
def test_forces_and_stress(name, device):
    arguments, error, text = BAD_ENERGIES[name]
    raises(error, text, diffnl.forces_and_stress, **energy_inputs(device) | on(device, arguments))


STRAINED = dict(positions=R, cell=H, strain=0 * H)
BAD_STRAINS = {
    "strain_shape": (dict(strain=0 * BATCH), ValueError, ["`strain`", "`cell`", "(3, 3)", "(2, 3, 3)"]),
    "strain_dtype": (
        dict(strain=H.double()),
        TypeError,
        ["`strain`", "`cell`", "torch.float32", "torch.float64"],
    ),
    "strain_type": (dict(strain=0.0), TypeError, ["`strain`", "Tensor", "float"]),
    "system_idx_missing": (
        dict(cell=BATCH, strain=0 * BATCH),
        ValueError,
        ["`system_idx`", "2 cells", "None"],
    ),
    "system_idx_range": (
        dict(cell=BATCH, strain=0 * BATCH, system_idx=changed(INDEX, 1, 2)),
        ValueError,
        ["`system_idx`", "[0, 2)", "2", "atom 1"],
    ),
}


@pytest.mark.parametrize("name", BAD_STRAINS)
def test_strained(name, device):
    arguments, error, text = BAD_STRAINS[name]
    raises(error, text, diffnl.strained, **on(device, STRAINED | arguments))
