"""What the adapters make of what they are given, without the codes they are for.

Nothing is written to, nothing around a call changes its result, and dropped neighbours are told.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_adapters_devices import CASES, CUTOFF, batch

import diffnl
from diffnl.adapters import (
    _common,
    ase,
    fairchem,
    mace,
    nvalchemi,
    pyg,
    pymatgen,
    sevennet,
)

pytestmark = pytest.mark.filterwarnings("ignore:`max_num_neighbors_threshold` = 9 drops")


def arrays(function):
    """A case of the first system for an adapter that takes arrays: positions, cell, flags."""

    def case(r, h, pbc, index):
        found = function(r[index == 0].numpy(), h[1].numpy(), pbc[1].numpy())
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in found]

    case.__name__ = f"of_{function.__name__}"
    return case


@arrays
def of_ase(r, h, pbc):
    cutoffs = np.full(len(r), CUTOFF / 2)
    lists = [ase.primitive_neighbor_list("ijdDS", pbc, h, r, cutoff) for cutoff in (CUTOFF, cutoffs)]
    scaled = ase.primitive_neighbor_list("ijdDS", pbc, h, r / 8, CUTOFF, None, True, True)
    return *lists[0], *lists[1], *scaled


@arrays
def of_pymatgen(r, h, pbc):
    apart = pymatgen.find_points_in_spheres(r, r[:2], CUTOFF, pbc, h)
    return *pymatgen.find_points_in_spheres(r, r, CUTOFF, pbc, h), *apart


@arrays
def of_sevennet(r, h, pbc):
    return sevennet.graph_build(CUTOFF, pbc, h, r)


@arrays
def of_mace_neighborhood(r, h, pbc):
    slab, open_rows = mace.get_neighborhood(r, CUTOFF, tuple(pbc.tolist()), h), h * pbc[:, None]
    return *slab, *mace.get_neighborhood(r, CUTOFF, tuple(pbc.tolist()), open_rows)


EVERY = [*CASES, of_ase, of_pymatgen, of_sevennet, of_mace_neighborhood]
every_adapter = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.__name__[3:])


def in_a_view(t):
    """The same values in every other row of a larger tensor."""
    larger = torch.stack((t, t), 1)
    return larger, larger[:, 0]


@every_adapter
def test_writes_to_nothing_it_is_given(case):
    """Also around the view that is given: MACE's list overwrites rows of the caller's cell."""
    larger, views = zip(*map(in_a_view, batch("cpu")), strict=True)
    before = [t.clone() for t in larger]
    case(*views)
    for now, then in zip(larger, before, strict=True):
        assert torch.equal(now, then)


AMBIENT = {
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
}


@every_adapter
@pytest.mark.parametrize("around", AMBIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_whatever_is_around(case, around, dtype):
    if around == "no gradients" and case.__name__ == "of_mace":
        pytest.skip("this case takes gradients")
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in batch("cpu")]
    expected = case(*inputs)
    with AMBIENT[around]():
        found = case(*inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_are_those_of_the_contract_under_autocast(dtype):
    """S @ h as in the vectors of the list, with gradients that are not rounded either: `@` was bfloat16."""
    generator = torch.Generator("cpu").manual_seed(0)
    shifts = torch.randint(-3, 4, (50, 3), generator=generator, dtype=torch.int32, device="cpu")
    cell = torch.randn(3, 3, generator=generator, dtype=dtype, device="cpu").requires_grad_()
    pair = torch.zeros(2, 50, dtype=torch.int64, device="cpu")
    expected = diffnl.pair_vectors(cell.new_zeros(1, 3), cell, pair, shifts)
    weights = torch.randn(50, 3, generator=generator, dtype=dtype, device="cpu")
    (by_list,) = torch.autograd.grad((weights * expected).sum(), cell)
    with torch.autocast("cpu", torch.bfloat16):
        found = _common.product(shifts.to(dtype), cell)
        (gradient,) = torch.autograd.grad((weights * found).sum(), cell)
        if dtype == torch.float32:  # what this is a test of
            assert (shifts.to(dtype) @ cell).dtype == torch.bfloat16
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient, by_list, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_products_are_the_same_bits_where_float32_may_be_tf32(gpu):
    """In strains of MACE's graphs and offsets of SchNetPack's list."""
    generator = torch.Generator("cpu").manual_seed(1)
    a = torch.randn(64, 1, 3, generator=generator, device="cpu")
    b = torch.randn(64, 3, 3, generator=generator, device="cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = _common.product(a.to(gpu), b.to(gpu))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.cpu(), _common.product(a, b))


# ------------------------------------------------------------------------------ neighbours that are dropped


def line(dtype=torch.float64):
    """Nine points 1 Å apart. Within 4.5 Å they have 4, 5, 6, 7, 8, 7, 6, 5 and 4 neighbours."""
    return torch.stack(
        [torch.arange(9.0, dtype=dtype, device="cpu")] + [torch.zeros(9, dtype=dtype, device="cpu")] * 2, 1
    )


def graph_of(pos, **more):
    pbc = torch.zeros(1, 3, dtype=torch.bool, device="cpu")
    natoms = torch.tensor([len(pos)], device="cpu")
    return SimpleNamespace(pos=pos, cell=pos.new_zeros(1, 3, 3), natoms=natoms, pbc=pbc, **more)


LIMITED = {
    "fairchem": lambda most: fairchem.radius_graph_pbc(graph_of(line()), 4.5, most, True)[0],
    "fairchem v2": lambda most: fairchem.radius_graph_pbc_v2(graph_of(line()), 4.5, most, True)[0],
    "pyg": lambda most: pyg.radius_graph(line(), 4.5, max_num_neighbors=most),
    "nvalchemi": lambda most: nvalchemi.neighbor_list(line(), 4.5, max_neighbors=most)[0],
}


@pytest.mark.parametrize("adapter", LIMITED)
def test_neighbours_beyond_a_limit_are_a_warning(adapter):
    """A limit of 5 drops 1 + 2 + 3 + 2 + 1 edges: fairchem's and nvalchemi's were dropped in silence."""
    with pytest.warns(UserWarning, match=r"`max_\w+` = 5 drops 9 of 52 edges") as caught:
        LIMITED[adapter](5)
    assert caught[0].filename == __file__
    LIMITED[adapter](8)  # warnings are errors here


def test_a_shell_that_is_kept_whole_is_no_warning():
    """Not strict: the ninth neighbour is as far as the eighth, and so kept."""
    fairchem.radius_graph_pbc(graph_of(line()), 4.5, 7)
    with pytest.warns(UserWarning, match="drops"):
        fairchem.radius_graph_pbc(graph_of(line()), 4.5, 7, True)


def test_atoms_whose_squared_distance_is_0_in_float32_are_an_edge():
    """1e-23 Å apart: only coincident atoms are none for the second version of fairchem's function."""
    pos = torch.tensor([[0.0, 0, 0], [1e-23, 0, 0], [0, 0, 0]], device="cpu")
    edges = fairchem.radius_graph_pbc_v2(graph_of(pos), 1.0, -1)[0]
    assert edges.T.tolist() == [[1, 0], [0, 1], [2, 1], [1, 2]]
