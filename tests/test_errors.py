"""Bad input of a list: every row of the contract's table, by type and text."""

import pytest
import torch
from compare import assert_same_bits
from refusals import BATCH, INDEX, INF, NAN, H, R, call, changed, on, raises

import diffnl

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
