"""Bad input: every row of the contract's table, by type and text."""

import re
import subprocess
import sys

import pytest
import torch
from compare import assert_same_bits

import diffnl

R = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 1.5, 1.0]])
H = 4.0 * torch.eye(3)
BATCH = H.repeat(2, 1, 1)
INDEX = torch.tensor([0, 1, 0])
NAN, INF = float("nan"), float("inf")


def call(positions=R, cell=H, pbc=True, cutoff=2.0, system_idx=None):
    return diffnl.neighbor_pairs(positions, cell, pbc, cutoff, system_idx)


def changed(t, index, value):
    t = t.clone()
    t[index] = value
    return t


def raises(error, text, function=call, **arguments):
    """`function(**arguments)` raises `error` with a message that has every piece of `text` in that order."""
    with pytest.raises(error) as caught:
        function(**arguments)
    pattern = ".*".join(re.escape(piece) for piece in ([text] if isinstance(text, str) else text))
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def on(device, arguments):
    """Arguments with their tensors on `device`."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


SHAPES = {
    "positions_flat": (dict(positions=torch.zeros(6)), ["`positions`", "(N, 3)", "(6,)"]),
    "positions_four_columns": (dict(positions=torch.zeros(2, 4)), ["`positions`", "(N, 3)", "(2, 4)"]),
    "positions_transposed": (dict(positions=torch.zeros(3, 5)), ["`positions`", "(N, 3)", "(3, 5)"]),
    "positions_batched": (dict(positions=torch.zeros(2, 4, 3)), ["`positions`", "(N, 3)", "(2, 4, 3)"]),
    "positions_scalar": (dict(positions=torch.tensor(1.0)), ["`positions`", "(N, 3)", "()"]),
    "cell_lengths": (dict(cell=torch.ones(3)), ["`cell`", "(3, 3)", "(B, 3, 3)", "(3,)"]),
    "cell_not_square": (dict(cell=torch.ones(3, 2)), ["`cell`", "(3, 3)", "(B, 3, 3)", "(3, 2)"]),
    "cell_four_axes": (dict(cell=torch.ones(1, 1, 3, 3)), ["`cell`", "(3, 3)", "(B, 3, 3)", "(1, 1, 3, 3)"]),
    "pbc_two_flags": (dict(pbc=(True, False)), ["`pbc`", "three", "2"]),
    "pbc_four_flags": (dict(pbc=torch.ones(4, dtype=torch.bool)), ["`pbc`", "(3,)", "(B, 3)", "(4,)"]),
    "pbc_of_three_systems": (
        dict(cell=BATCH, pbc=torch.ones(3, 3, dtype=torch.bool), system_idx=INDEX),
        ["`pbc`", "2", "(3, 3)"],
    ),
    "system_idx_short": (dict(cell=BATCH, system_idx=INDEX[:2]), ["`system_idx`", "(N,)", "(3,)", "(2,)"]),
    "system_idx_column": (dict(cell=BATCH, system_idx=INDEX[:, None]), ["`system_idx`", "(N,)", "(3, 1)"]),
    "two_cells_without_system_idx": (dict(cell=BATCH), ["`system_idx`", "2 cells", "None"]),
    "no_cells_for_atoms": (dict(cell=BATCH[:0], system_idx=INDEX), ["`cell`", "3 atoms", "(0, 3, 3)"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    arguments, text = SHAPES[name]
    raises(ValueError, text, **arguments)


TYPES = {
    "positions_half": (dict(positions=R.half()), ["`positions`", "float32 or float64", "torch.float16"]),
    "positions_bfloat16": (
        dict(positions=R.bfloat16()),
        ["`positions`", "float32 or float64", "torch.bfloat16"],
    ),
    "positions_integer": (dict(positions=R.long()), ["`positions`", "float32 or float64", "torch.int64"]),
    "positions_complex": (
        dict(positions=R.cfloat()),
        ["`positions`", "float32 or float64", "torch.complex64"],
    ),
    "positions_list": (dict(positions=R.tolist()), ["`positions`", "Tensor", "list"]),
    "positions_array": (dict(positions=R.numpy()), ["`positions`", "Tensor", "ndarray"]),
    "positions_none": (dict(positions=None), ["`positions`", "Tensor", "None"]),
    "cell_double": (dict(cell=H.double()), ["`cell`", "`positions`", "torch.float32", "torch.float64"]),
    "cell_float": (dict(positions=R.double()), ["`cell`", "`positions`", "torch.float64", "torch.float32"]),
    "cell_integer": (dict(cell=H.long()), ["`cell`", "`positions`", "torch.float32", "torch.int64"]),
    "cell_array": (dict(cell=H.numpy()), ["`cell`", "Tensor", "ndarray"]),
    "system_idx_float": (
        dict(cell=BATCH, system_idx=INDEX.float()),
        ["`system_idx`", "integer", "torch.float32"],
    ),
    "system_idx_bool": (dict(cell=BATCH, system_idx=INDEX.bool()), ["`system_idx`", "integer", "torch.bool"]),
    "system_idx_list": (dict(cell=BATCH, system_idx=[0, 1, 0]), ["`system_idx`", "Tensor", "list"]),
    "pbc_float": (dict(pbc=torch.ones(3)), ["`pbc`", "bool", "torch.float32"]),
    "pbc_numbers": (dict(pbc=(1.0, 1.0, 1.0)), ["`pbc`", "bool", "(1.0, 1.0, 1.0)"]),
    "pbc_word": (dict(pbc="xyz"), ["`pbc`", "bool", "xyz"]),
    "cutoff_word": (dict(cutoff="5"), ["`cutoff`", "number", "'5'"]),
    "cutoff_none": (dict(cutoff=None), ["`cutoff`", "number", "None"]),
    "cutoff_bool": (dict(cutoff=True), ["`cutoff`", "number", "True"]),
    "cutoff_two": (dict(cutoff=torch.ones(2)), ["`cutoff`", "number", "Tensor"]),
}


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    arguments, text = TYPES[name]
    raises(TypeError, text, **arguments)


VALUES = {
    "cutoff_zero": (dict(cutoff=0.0), ["`cutoff`", "finite", "> 0", "0.0"]),
    "cutoff_beyond_a_float": (dict(cutoff=10**400), ["`cutoff`", "finite", "inf"]),
    "pbc_missing": (dict(pbc=None), ["`pbc`", "`cell`", "None", "pbc=True", "cell=None"]),
    "pbc_missing_of_a_zero_cell": (dict(pbc=None, cell=0 * H), ["`pbc`", "pbc=True", "cell=None"]),
    "pbc_missing_of_a_batch": (dict(pbc=None, cell=BATCH, system_idx=INDEX), ["`pbc`", "pbc=True"]),
    "pbc_other_integers": (dict(pbc=[2, 1, 1]), ["`pbc`", "0 and 1", "[2, 1, 1]"]),
    "pbc_another_integer": (dict(pbc=-1), ["`pbc`", "0 and 1", "-1"]),
    "pbc_tensor_of_other_integers": (dict(pbc=torch.tensor([1, 0, 3])), ["`pbc`", "0 and 1", "[1, 0, 3]"]),
    "cutoff_negative": (dict(cutoff=-3.5), ["`cutoff`", "> 0", "-3.5"]),
    "cutoff_infinite": (dict(cutoff=INF), ["`cutoff`", "finite", "inf"]),
    "cutoff_nan": (dict(cutoff=NAN), ["`cutoff`", "finite", "nan"]),
    "positions_nan": (dict(positions=changed(R, (1, 2), NAN)), ["`positions`", "finite", "nan", "atom 1"]),
    "positions_inf": (dict(positions=changed(R, (2, 0), INF)), ["`positions`", "finite", "inf", "atom 2"]),
    "positions_first_of_two": (
        dict(positions=changed(changed(R, (2, 0), NAN), (0, 0), -INF)),
        ["`positions`", "finite", "-inf", "atom 0"],
    ),
    "positions_nan_open": (
        dict(positions=changed(R, (1, 0), NAN), cell=None, pbc=None),
        ["`positions`", "atom 1"],
    ),
    "cell_nan": (dict(cell=changed(H, (1, 1), NAN)), ["`cell`", "finite", "nan", "system 0"]),
    "cell_inf_of_second": (
        dict(cell=changed(BATCH, (1, 0, 2), INF), system_idx=INDEX),
        ["`cell`", "finite", "inf", "system 1"],
    ),
    "cell_nan_on_an_open_axis": (
        dict(cell=changed(H, (2, 2), NAN), pbc=(True, True, False)),
        ["`cell`", "finite", "nan", "system 0"],
    ),
    "system_idx_too_large": (
        dict(cell=BATCH, system_idx=changed(INDEX, 1, 2)),
        ["`system_idx`", "[0, 2)", "2", "atom 1"],
    ),
    "system_idx_negative": (
        dict(cell=BATCH, system_idx=changed(INDEX, 2, -1)),
        ["`system_idx`", "[0, 2)", "-1", "atom 2"],
    ),
    "system_idx_of_one_cell": (dict(system_idx=INDEX), ["`system_idx`", "[0, 1)", "1", "atom 1"]),
    "system_idx_negative_open": (
        dict(cell=None, pbc=None, system_idx=changed(INDEX, 0, -4)),
        ["`system_idx`", "-4", "atom 0"],
    ),
    "cell_zero": (dict(cell=0 * H), ["`cell`", "independent", "periodic", "system 0"]),
    "cell_zero_row": (dict(cell=changed(H, 1, 0.0)), ["`cell`", "independent", "periodic", "system 0"]),
    "cell_zero_row_periodic_of_slab": (
        dict(cell=changed(H, 1, 0.0), pbc=(True, True, False)),
        ["`cell`", "independent", "periodic", "system 0"],
    ),
    "cell_coplanar": (
        dict(cell=changed(H, 2, H[0] + H[1])),
        ["`cell`", "independent", "periodic", "system 0"],
    ),
    "cell_collinear_of_second": (
        dict(cell=changed(BATCH, (1, 2), -BATCH[1, 0]), system_idx=INDEX, pbc=(True, False, True)),
        ["`cell`", "independent", "periodic", "system 1"],
    ),
    "cell_singular_of_empty_system": (
        dict(cell=changed(BATCH, 1, 0.0), system_idx=0 * INDEX),
        ["`cell`", "independent", "periodic", "system 1"],
    ),
    "pbc_without_cell": (dict(cell=None, pbc=True), ["`cell`", "`pbc`", "None"]),
    "one_flag_without_cell": (dict(cell=None, pbc=(False, False, True)), ["`cell`", "`pbc`", "None"]),
    "shift_beyond_int32": (
        dict(positions=changed(R.double(), (1, 0), 1e11), cell=H.double()),
        ["`positions`", "int32"],
    ),
    "far_too_far_for_int64": (
        dict(positions=changed(R.double(), (1, 0), 1e300), cell=H.double()),
        ["`positions`", "int32"],
    ),
    "images_blur_in_float32": (dict(positions=changed(R, (1, 0), 1e9)), ["`positions`", "float32"]),
}


VALID = dict(positions=R, cell=H, pbc=True, cutoff=2.0, system_idx=None)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("search", ["compiled", "oracle"])
def test_values(search, name, device):
    arguments, text = VALUES[name]
    function = diffnl.neighbor_pairs if search == "compiled" else diffnl.reference.neighbor_pairs
    raises(ValueError, text, function, **on(device, VALID | arguments))


@pytest.mark.parametrize("name", VALUES)
def test_values_with_gradients(name, device):
    """Tensors that require a gradient, as a model has them, take another way into the search."""
    arguments, text = VALUES[name]
    values = on(device, VALID | arguments)
    for key in ("positions", "cell"):
        values[key] = values[key] if values[key] is None else values[key].clone().requires_grad_()
    raises(ValueError, text, diffnl.neighbor_pairs, **values)


def test_the_first_bad_atom_of_many_is_named(dtype, device):
    positions = torch.zeros(100_000, 3, dtype=dtype)
    positions[:, 0] = torch.arange(100_000)
    positions[[99_999, 4321, 70_000], [0, 1, 2]] = NAN
    raises(
        ValueError,
        ["`positions`", "nan", "atom 4321"],
        call,
        positions=positions.to(device),
        cell=None,
        pbc=None,
    )


def test_an_error_leaves_the_next_call_intact(device):
    expected = call(**on(device, VALID))
    for arguments, _ in VALUES.values():
        with pytest.raises(ValueError):
            call(**on(device, VALID | arguments))
        assert_same_bits(call(**on(device, VALID)), expected)


OTHER_DEVICE = {
    "cell": dict(cell=H.to("meta")),
    "pbc": dict(pbc=torch.ones(3, dtype=torch.bool, device="meta")),
    "system_idx": dict(cell=BATCH, system_idx=INDEX.to("meta")),
}


@pytest.mark.parametrize("name", OTHER_DEVICE)
def test_devices(name, device):
    arguments = {"positions": R.to(device), "cell": H.to(device)} | OTHER_DEVICE[name]
    if name == "system_idx":
        arguments["cell"] = BATCH.to(device)
    raises(ValueError, [f"`{name}`", "device", str(R.to(device).device), "meta"], **arguments)


# ----- the other functions ---------------------------------------------------------------------------------

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


BATCH_LIST = dict(cell=BATCH, system_idx=INDEX)
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
        dict(cell=BATCH, system_idx=changed(INDEX, 1, 2)),
        ["`system_idx`", "[0, 2)", "2", "atom 1"],
    ),
    "system_idx_negative": (
        dict(cell=BATCH, system_idx=changed(INDEX, 1, -1)),
        ["`system_idx`", "[0, 2)", "-1", "atom 1"],
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
    """(P,) whether a pair leads outside the tensors, or its shift outside int32."""
    inside = (mapping >= 0) & (mapping < len(positions))
    shifts = shifts.long()  # a GPU compares int32 with 2**31 in int32
    inside = inside & ((shifts >= -(2**31)) & (shifts < 2**31)).all(1)
    if system_idx is not None:
        owner = system_idx[mapping[0].clamp(0, len(positions) - 1)]
        inside = inside & (owner >= 0) & (owner < len(cell))
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


# ----- memory ----------------------------------------------------------------------------------------------

TOO_MANY = """
import resource, torch, diffnl
near = torch.zeros(1, 3)
before = diffnl.neighbor_pairs(near, torch.eye(3), True, 3.0)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
for _ in range(2):
    try:
        diffnl.neighbor_pairs(near, 0.1 * torch.eye(3), True, 18.0)  # 2.4e7 pairs, 1 GB
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(type(error).__name__, error)
    after = diffnl.neighbor_pairs(near, torch.eye(3), True, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
print("state intact")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a Linux process")
def test_more_pairs_than_memory_holds(cpu_backend):
    script = subprocess.run([sys.executable, "-c", TOO_MANY], capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    assert script.stdout.count("OutOfMemoryError out of memory: `cutoff`") == 2, script.stdout
    assert script.stdout.endswith("state intact\n")


PERIODIC, SLAB = True, (True, True, False)
WRONG_UNIT = {
    "full": (PERIODIC, 1e5, {}, 4e15),
    "half": (PERIODIC, 1e5, {"full": False}, 2e15),
    "several": (PERIODIC, (3.0, 1e5), {}, 4e15),
    "skin": (PERIODIC, 5.0, {"skin": 1e5}, 4e15),
    "slab": (SLAB, 3e6, {}, 1e14),
}


@pytest.mark.parametrize("name", WRONG_UNIT)
def test_a_cutoff_in_the_wrong_unit(name, dtype, gpu_kernels, device):
    """Eight atoms in 4 Å. The number of pairs in the message has been estimated: a count stops much earlier,
    at what memory holds, after seconds."""
    pbc, cutoff, options, pairs = WRONG_UNIT[name]
    if name == "slab" and dtype == torch.float32:
        pytest.skip("float32 cannot tell these images apart")
    generator = torch.Generator().manual_seed(3)
    positions = torch.rand(8, 3, generator=generator, dtype=torch.float64, device="cpu")
    where = (4 * positions).to(device, dtype), H.to(device, dtype)
    layer = diffnl.NeighborList(cutoff, **options)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="`cutoff`.* must leave few enough pairs") as error:
            layer(*where, pbc)
        counted = int(re.search(r"at least (\d+) pairs", str(error.value))[1])
        assert counted > (0.4 if gpu_kernels else 0.9) * pairs
        assert diffnl.neighbor_pairs(*where, pbc, 3.0).mapping.shape[1] > 0


def test_a_capacity_for_a_cutoff_in_the_wrong_unit(device):
    positions, cell = R.double().to(device), 4 * torch.eye(3, dtype=torch.float64, device=device)
    pairs = diffnl.neighbor_pairs(positions, cell, True, 1e5, capacity=100)
    assert pairs.vectors.isnan().any(1).all()
    with pytest.raises(ValueError, match=r"`capacity` must be at least .* \d{14,}; got 100"):
        pairs.check()


@pytest.mark.parametrize("capacity", [10**14, 2**62])
def test_a_capacity_beyond_memory(capacity, device):
    with pytest.raises(torch.OutOfMemoryError, match=f"`capacity` must fit in memory; got {capacity} pairs"):
        diffnl.neighbor_pairs(R.to(device), H.to(device), True, 3.0, capacity=capacity)


@pytest.mark.parametrize("search", [diffnl.neighbor_pairs, diffnl.reference.neighbor_pairs])
def test_a_stray_system_idx_without_a_cell(search, device):
    """Systems without cells are groups of atoms: 10^18 once meant as many cells of zeros."""
    system_idx = torch.tensor([0, 10**18, 0, 3, 10**18, 3, 0, 10**18], device=device)
    positions = (
        torch.rand(8, 3, generator=torch.Generator().manual_seed(4), device="cpu").to(device).requires_grad_()
    )
    pairs = search(positions, None, None, 1.0, system_idx, sorted=True)
    near = search(positions, None, None, 1.0, system_idx.clamp(max=4), sorted=True)
    assert_same_bits(pairs, near)
    assert pairs.mapping.shape[1] > 0
    (gradient,) = torch.autograd.grad(pairs.vectors.square().sum(), positions)
    (expected,) = torch.autograd.grad(near.vectors.square().sum(), positions)
    assert torch.equal(gradient, expected)
    system_idx[2] = -1
    with pytest.raises(ValueError, match=rf"`system_idx` must be in \[0, {10**18 + 1}\); got -1 for atom 2"):
        search(positions, None, None, 1.0, system_idx)
