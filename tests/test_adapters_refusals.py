"""What the adapters refuse, naming the argument, and what they take in any form, without their packages."""

import math
import re

import numpy as np
import pytest
import torch
from test_adapters_arguments import graph_of
from test_adapters_devices import batch
from torch.fx.experimental.proxy_tensor import make_fx

import diffnl
from diffnl.adapters import (
    _common,
    ase,
    chgnet,
    fairchem,
    hip_torch_nl,
    mace,
    nequip,
    nvalchemi,
    pyg,
    pymatgen,
    sevennet,
    torchmdnet,
    torchsim,
)

R, H, PBC, INDEX = batch("cpu")
CELL, ONE = H[0], R[:3]
FLAGS, BOX = [True] * 3, (9.0 * torch.eye(3, dtype=torch.float64, device="cpu"))
BOX32 = 9.0 * np.eye(3)


def radii(cutoff, numbers=(1, 1, 8)):
    return ase.primitive_neighbor_list("ij", FLAGS, BOX32, ONE.numpy(), cutoff, numbers)


def torchmd(**options):
    return torchmdnet.OptimizedDistance(**options)(ONE)


BAD_VALUES = {
    "ase, 0": (lambda: radii(0.0), "`cutoff` must be finite and > 0; got 0.0"),
    "ase, negative": (lambda: radii(-1.0), "`cutoff` must be finite and > 0; got -1.0"),
    "ase, a negative radius": (
        lambda: radii([1.0, -0.5, 1.0]),
        "`cutoff` must be .* >= 0; got -0.5 for atom 1",
    ),
    "ase, radii of 0": (lambda: radii([0.0] * 3), "`cutoff` must be > 0 for some pair; got 0 for all"),
    "ase, too many radii": (lambda: radii([1.0] * 4), r"`cutoff` must be a number or radii \(N,\) = \(3,\)"),
    "ase, too few radii": (lambda: radii([1.0]), r"`cutoff` .* radii \(N,\) = \(3,\); got shape \(1,\)"),
    "ase, NaN": (lambda: radii([1.0, math.nan, 1.0]), "`cutoff` must be finite and >= 0; got nan for atom 1"),
    "ase, too few numbers": (lambda: radii({(1, 1): 1.0}, [1]), r"`numbers` must have shape \(N,\) = \(3,\)"),
    "ase, flags": (
        lambda: ase.primitive_neighbor_list("i", [1, 0], BOX32, ONE.numpy(), 1.0),
        "`pbc` .* or three",
    ),
    "chgnet": (
        lambda: chgnet.GraphConverter(on_isolated_atoms="eror"),
        "`on_isolated_atoms` must be 'ignore', 'warn' or 'error'; got 'eror'",
    ),
    "fairchem": (
        lambda: fairchem.radius_graph_pbc(graph_of(ONE), -4.0, 9),
        "`radius` must be finite and > 0; got -4",
    ),
    "hip_torch_nl": (
        lambda: hip_torch_nl.hip_torch_nl(ONE, CELL, True, 0),
        "`cutoff` must be finite and > 0",
    ),
    "mace": (lambda: mace.get_neighborhood(ONE.numpy(), 0.0), "`cutoff` must be finite and > 0; got 0"),
    "mace, no atoms": (
        lambda: mace.get_neighborhood(np.zeros((0, 3)), 1.0),
        "`positions` must have at least one",
    ),
    "nequip": (
        lambda: nequip.neighbor_list({"pos": ONE}, math.inf),
        "`r_max` must be finite and > 0; got inf",
    ),
    "nequip, a cell": (
        lambda: nequip.neighbor_list({"pos": ONE, "cell": CELL}, 1.0),
        "`pbc` must be in the data",
    ),
    "nvalchemi": (
        lambda: nvalchemi.neighbor_list(ONE, 1.0, cutoff2=-1.0),
        "`cutoff2` must be finite and > 0",
    ),
    "nvalchemi, K": (
        lambda: nvalchemi.neighbor_list(ONE, 1.0, max_neighbors=-1),
        "`max_neighbors` must be >= 0",
    ),
    "pyg": (lambda: pyg.radius_graph(ONE, 0.0), "`r` must be finite and > 0; got 0"),
    "pyg, no neighbours": (
        lambda: pyg.radius_graph(ONE, 1.0, max_num_neighbors=0),
        "`max_num_neighbors` .* >= 1",
    ),
    "pyg, transform": (lambda: pyg.PeriodicRadiusGraph(-1.0), "`r` must be finite and > 0; got -1"),
    "pymatgen": (
        lambda: pymatgen.find_points_in_spheres(ONE.numpy(), ONE.numpy(), -3.0, FLAGS, BOX32),
        "`r` must be finite and >= 0; got -3",
    ),
    "sevennet": (
        lambda: sevennet.graph_build(-1.0, FLAGS, BOX32, ONE.numpy()),
        "`cutoff` must be finite and > 0",
    ),
    "torchmdnet, lower": (
        lambda: torchmd(cutoff_lower=-1.0),
        "`cutoff_lower` must be finite and >= 0; got -1",
    ),
    "torchmdnet, upper": (lambda: torchmd(cutoff_upper=0.0), "`cutoff_upper` must be finite and > 0; got 0"),
    "torchmdnet, NaN": (
        lambda: torchmdnet.OptimizedDistance(resize_to_fit=False)(torch.full_like(ONE, math.nan)),
        "`positions` must be finite",
    ),
    "torchsim": (
        lambda: torchsim.torchsim_nl(R, H, PBC, -1.0, INDEX),
        "`cutoff` must be finite and > 0; got -1",
    ),
    "torchsim, gradient": (
        lambda: torchsim.unbatched_nl(ONE, CELL, True, torch.tensor(3.0, requires_grad=True, device="cpu")),
        "`cutoff` must not require a gradient",
    ),
}
BAD_TYPES = {
    "ase": (
        lambda: ase.primitive_neighbor_list("i", FLAGS, BOX32, ONE.numpy(), 1.0, None, "no"),
        "`self_interaction`",
    ),
    "ase, scaled": (
        lambda: ase.primitive_neighbor_list("i", FLAGS, BOX32, ONE.numpy(), 1.0, None, False, "no"),
        "`use_scaled_positions`",
    ),
    "ase, flags": (lambda: ase.primitive_neighbor_list("i", "TTF", BOX32, ONE.numpy(), 1.0), "`pbc`"),
    "ase, text": (lambda: radii("3.0"), "`cutoff` must be a number; got '3.0' of type str"),
    "fairchem": (
        lambda: fairchem.radius_graph_pbc(graph_of(ONE), 4.0, 9, "no"),
        "`enforce_max_neighbors_strictly`",
    ),
    "fairchem, n": (
        lambda: fairchem.radius_graph_pbc(graph_of(ONE), 4.0, 9.5),
        "`max_num_neighbors_threshold`",
    ),
    "hip_torch_nl": (
        lambda: hip_torch_nl.hip_torch_nl(ONE, CELL, True, 3.0, "no"),
        "`sort_id` must be True or False",
    ),
    "hip_torch_nl, text": (
        lambda: hip_torch_nl.hip_torch_nl(ONE, CELL, True, "3.0"),
        "`cutoff` must be a number",
    ),
    "nvalchemi": (
        lambda: nvalchemi.neighbor_list(ONE, 1.0, half_fill="full"),
        "`half_fill` must be True or False",
    ),
    "nvalchemi, COO": (lambda: nvalchemi.neighbor_list(ONE, 1.0, return_vectors="no"), "`return_vectors`"),
    "pyg": (
        lambda: pyg.radius_graph(ONE, 1.0, loop="no"),
        "`loop` must be True or False; got 'no' of type str",
    ),
    "torchmdnet": (lambda: torchmdnet.OptimizedDistance(include_transpose="no"), "`include_transpose`"),
    "torchsim": (
        lambda: torchsim.torchsim_nl(R, H, PBC, 1.0, INDEX, "no"),
        "`self_interaction` must be True or",
    ),
    "torchsim, several": (
        lambda: torchsim.unbatched_nl(ONE, CELL, True, (3.0, 4.0)),
        "`cutoff` must be a number",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_an_error_that_names_the_argument(name):
    call, message = BAD_VALUES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", BAD_TYPES)
def test_what_is_only_true_in_an_if_is_an_error(name):
    call, message = BAD_TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


# Cartesian shifts given by mistake, and what no int32 holds.
NOT_WHOLE = [0.4, 1.0 - 1e-6, 3e9, -3e9, math.nan, math.inf]


@pytest.mark.parametrize("value", NOT_WHOLE)
def test_shifts_that_are_not_whole_numbers(value, device):
    """On a GPU nothing waits to raise: vectors and lengths of such pairs are NaN, and no others."""
    r, h = (t.to(device) for t in (ONE, CELL))
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]], device=device)
    shifts = torch.zeros(3, 3, dtype=torch.float64, device=device)
    expected, _ = mace.edge_vectors_and_lengths(r, edges, shifts, h)
    shifts[1, 2] = value
    if device.type == "cpu":
        got = re.escape(f"got [0.0, 0.0, {value}] in row 1")
        with pytest.raises(ValueError, match=f"`unit_shifts` must hold whole numbers that fit int32; {got}"):
            mace.edge_vectors_and_lengths(r, edges, shifts, h)
        return
    vectors, lengths = mace.edge_vectors_and_lengths(r, edges, shifts, h)
    assert vectors[1].isnan().all() and lengths[1].isnan().all()
    assert torch.equal(vectors[[0, 2]], expected[[0, 2]])


def test_shifts_that_are_not_whole_numbers_are_nan_where_nobody_may_look():
    """As on a GPU, in a graph that is traced."""
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]], device="cpu")
    shifts = torch.zeros(3, 3, dtype=torch.float64, device="cpu")
    args = (ONE, edges, shifts, CELL)
    traced = make_fx(lambda *tensors: mace.edge_vectors_and_lengths(*tensors))(*args)
    expected, _ = mace.edge_vectors_and_lengths(*args)
    shifts[1, 2] = 0.4
    vectors, lengths = traced(*args)
    assert vectors[1].isnan().all() and lengths[1].isnan().all()
    assert torch.equal(vectors[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.float32, torch.float64], ids=str
)
def test_whole_shifts_of_any_dtype(dtype):
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]], device="cpu")
    shifts = torch.tensor([[0, 1, -1], [2, 0, 0], [0, 0, -3]], dtype=dtype, device="cpu")
    vectors, _ = mace.edge_vectors_and_lengths(ONE, edges, shifts, CELL)
    assert torch.equal(vectors, diffnl.pair_vectors(ONE, CELL, edges, shifts.int()))


def test_shifts_of_64_bits_that_do_not_fit():
    edges = torch.tensor([[0], [1]], device="cpu")
    shifts = torch.tensor([[0, 2**32, 0]], device="cpu")
    with pytest.raises(
        ValueError, match=r"`unit_shifts` must .* fit int32; got \[0, 4294967296, 0\] in row 0"
    ):
        mace.edge_vectors_and_lengths(ONE, edges, shifts, CELL)


@pytest.mark.parametrize(
    "make", [bool, int, np.bool_, np.int64, torch.tensor], ids=lambda make: make.__name__
)
def test_flags_and_numbers_of_any_library_are_taken(make):
    with torch.device("cpu"):
        yes, no, three = make(True), make(False), [np.float32(3.0), torch.tensor(3.0), np.array(3.0)]
    assert (_common.flag("x", yes), _common.flag("x", no)) == (True, False)
    assert _common.axes([yes, no, yes]) == (True, False, True)
    assert _common.axes(yes) == (True, True, True)
    assert [_common.length("x", value) for value in three] == [3.0] * 3


def test_a_message_is_short_whatever_it_got():
    with pytest.raises(TypeError) as raised:
        _common.flag("loop", torch.zeros(100, 100, device="cpu"))
    assert len(str(raised.value)) < 200 and re.search("`loop` must be True or False", str(raised.value))


@pytest.mark.parametrize("adapter", ["torchsim", "nvalchemi", "nvalchemi, open", "torchmdnet"])
def test_a_stray_system_costs_nothing(adapter, device):
    """Where all systems share a cell, or have none: 5 * 10^7 once took 51 s and 22 GB."""
    positions = 4.0 * torch.rand(8, 3, generator=torch.Generator().manual_seed(4), device="cpu").to(device)
    cell = 4.0 * torch.eye(3, device=device)
    system_idx = torch.tensor([0, 10**18, 0, 3, 10**18, 3, 0, 10**18], device=device)
    flags = torch.ones(3, dtype=torch.bool, device=device)

    def edges(of_atom):
        if adapter == "torchsim":
            return torchsim.torchsim_nl(positions, cell, flags, 2.5, of_atom)[0]
        if adapter == "torchmdnet":
            return torchmdnet.OptimizedDistance(0.0, 2.5, box=cell, max_num_pairs=-100).to(device)(
                positions, of_atom
            )[0]
        given = {} if "open" in adapter else {"cell": cell, "pbc": flags}
        options = {"return_neighbor_list": True, "batch_idx": of_atom, **given}
        return nvalchemi.neighbor_list(positions, 2.5, **options)[0]

    found = edges(system_idx)
    assert found.shape[1] > 0 and torch.equal(found, edges(system_idx.clamp(max=4)))
