import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from recipes import run_recipe
from torchmdnet.models.model import create_model
from torchmdnet.models.utils import OptimizedDistance as Theirs

import diffnl
from diffnl.adapters.torchmdnet import OptimizedDistance, replace_distances

ADAPTER = "TorchMD-Net"
PACKAGES = ("torchmd-net",)

# What TorchMD-Net asks for: lower triangular, reduced, at least two cutoffs wide.
BOX = torch.tensor([[11.0, 0.0, 0.0], [3.0, 10.5, 0.0], [-2.0, 4.0, 12.0]], dtype=torch.float64)
BOXES = torch.stack((BOX, 1.1 * BOX, torch.diag(torch.tensor([10.0, 11.0, 12.0], dtype=torch.float64))))
BATCH = torch.arange(3).repeat_interleave(torch.tensor([25, 15, 20]))


def atoms(n=60, dtype=torch.float64, seed=0):
    return torch.rand(n, 3, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 11.0


def in_order(edge_index, edge_weight, edge_vec):
    order = np.lexsort((*edge_vec.detach().numpy().round(4).T, edge_index[1], edge_index[0]))
    return edge_index[:, order], edge_weight[order], edge_vec[order]


def assert_same(mine, other, tolerance=1e-10):
    for x, y in zip(in_order(*mine), in_order(*other), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("include_transpose", [True, False])
@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("cutoff_lower", [0.0, 2.0])
@pytest.mark.parametrize("box", [None, BOX, BOX[None], BOXES], ids=["open", "one", "one_3d", "three"])
@pytest.mark.parametrize("batch", [None, BATCH], ids=["single", "batch"])
def test_same_edges(batch, box, cutoff_lower, loop, include_transpose):
    if batch is None and box is BOXES:
        box = BOXES[2]
    options = {
        "cutoff_lower": cutoff_lower,
        "cutoff_upper": 5.0,
        "max_num_pairs": -60,
        "loop": loop,
        "include_transpose": include_transpose,
        "return_vecs": True,
    }
    pos = atoms()
    expected = Theirs(**options, box=box)(pos, batch)
    assert expected[0].shape[1] > 60
    assert_same(OptimizedDistance(**options, box=box)(pos, batch), expected)
    assert_same(OptimizedDistance(**options)(pos, batch, box), expected)


@pytest.mark.parametrize("strategy", ["brute", "cell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strategies_and_dtypes(dtype, strategy):
    box = torch.diag(torch.tensor([16.0, 17.0, 18.0], dtype=dtype))
    options = {"max_num_pairs": -60, "strategy": strategy, "return_vecs": True, "box": box}
    pos = atoms(dtype=dtype) * 1.5
    assert_same(OptimizedDistance(**options)(pos), Theirs(**options)(pos), 1e-5)
    mine, other = (cls(**{**options, "return_vecs": False})(pos) for cls in (OptimizedDistance, Theirs))
    assert mine[2] is other[2] is None
    assert OptimizedDistance(**options, long_edge_index=False)(pos)[0].dtype == torch.int32


def test_signature_and_state():
    ours, theirs = (inspect.signature(cls) for cls in (OptimizedDistance, Theirs))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]
    call, their_call = (inspect.signature(cls.forward) for cls in (OptimizedDistance, Theirs))
    assert list(call.parameters) == list(their_call.parameters)
    for box in (None, BOX):
        mine = OptimizedDistance(box=torch.zeros_like(BOX) if box is not None else None)
        mine.load_state_dict(Theirs(box=box).state_dict())
        assert box is None or torch.equal(mine.box, box)


@pytest.mark.parametrize("include_transpose", [True, False])
@pytest.mark.parametrize("cutoff_lower", [0.0, 2.5])
@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("box", [None, BOX, BOXES], ids=["open", "one", "three"])
def test_padding(box, loop, cutoff_lower, include_transpose):
    options = {
        "cutoff_lower": cutoff_lower,
        "max_num_pairs": 1800,
        "loop": loop,
        "include_transpose": include_transpose,
        "return_vecs": True,
        "resize_to_fit": False,
    }
    pos = atoms()
    mine, other = (cls(**options)(pos, BATCH, box) for cls in (OptimizedDistance, Theirs))
    real = [int((edges[0][0] >= 0).sum()) for edges in (mine, other)]
    assert real[0] == real[1] < 1800
    for edges in (mine, other):
        index, weight, vec = (
            x[..., real[0] :] if x.ndim < 2 or x.shape[0] == 2 else x[real[0] :] for x in edges
        )
        assert (index == -1).all() and not weight.any() and not vec.any()
    found, expected = ((index[:, : real[0]], w[: real[0]], v[: real[0]]) for index, w, v in (mine, other))
    assert_same(found, expected)


@pytest.mark.parametrize("resize_to_fit", [True, False])
@pytest.mark.parametrize("loop", [True, False])
def test_too_many(loop, resize_to_fit):
    pos = atoms()
    options = {"cutoff_upper": 5.0, "loop": loop, "box": BOX, "resize_to_fit": resize_to_fit}
    count = OptimizedDistance(**{**options, "resize_to_fit": True}, max_num_pairs=-60)(pos)[0].shape[1]
    for cls in (OptimizedDistance, Theirs):
        assert int((cls(**options, max_num_pairs=count)(pos)[0] >= 0).sum()) == 2 * count
        for most in (count - 1, 0, -1):
            with pytest.raises(RuntimeError, match="Found num_pairs > max_num_pairs"):
                cls(**options, max_num_pairs=most)(pos)


def test_no_atoms_and_no_edges():
    for pos in (torch.empty(0, 3), torch.zeros(1, 3), torch.tensor([[0.0, 0, 0], [9.0, 0, 0]])):
        batch = torch.zeros(len(pos), dtype=torch.long)
        for options in ({}, {"loop": True}):
            mine, other = (
                cls(return_vecs=True, **options)(pos, batch) for cls in (OptimizedDistance, Theirs)
            )
            assert_same(mine, other)


def test_cutoffs_are_below_and_strictly_below():
    pos = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [5.0, 0, 0]])
    for cls in (OptimizedDistance, Theirs):
        found = cls(cutoff_lower=2.0, cutoff_upper=3.0, max_num_pairs=-4)(pos)[0]
        assert sorted(map(tuple, found.T.tolist())) == [(0, 1), (1, 0)]


def test_any_box():
    """A box of less than two cutoffs, not reduced, turned: all images, where TorchMD-Net has the nearest."""
    turn = torch.linalg.qr(atoms(3))[0]
    box, pos = (BOX / 3.0 + torch.tensor([[0.0], [3.5], [0.0]]) * BOX[:1] / 11.0) @ turn, atoms(6)
    module = OptimizedDistance(cutoff_upper=5.0, max_num_pairs=-200, return_vecs=True)
    index, weight, vec = module(pos, box=box)
    expected = diffnl.reference.neighbor_pairs(pos, box, True, 5.0)
    assert_same((index, weight, vec), (expected.mapping.flip(0), expected.distances, expected.vectors))
    theirs = Theirs(cutoff_upper=5.0, max_num_pairs=-200, return_vecs=True)(pos, box=box)
    assert theirs[0].shape[1] < index.shape[1]


@pytest.mark.parametrize("resize_to_fit", [True, False])
def test_derivatives(resize_to_fit):
    """First ones in the positions as theirs; first and second ones, in the box too, against differences."""
    pos, box = atoms(8) * 0.5, BOX.clone()
    options = {"cutoff_upper": 4.0, "return_vecs": True, "loop": True, "resize_to_fit": resize_to_fit}

    def outputs(cls, pos, box):
        _, weight, vec = cls(max_num_pairs=-9, **options)(pos, None, box)
        return (weight**3).sum() + (vec.pow(2).sum(0) * torch.tensor([1.0, 2.0, 3.0])).sum()

    grads = []
    for cls in (OptimizedDistance, Theirs):
        at = pos.clone().requires_grad_()
        grads += torch.autograd.grad(outputs(cls, at, box), at)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)
    inputs = pos.clone().requires_grad_(), box.requires_grad_()
    torch.autograd.gradcheck(lambda *x: outputs(OptimizedDistance, *x), inputs)
    torch.autograd.gradgradcheck(lambda *x: outputs(OptimizedDistance, *x), inputs)


def test_errors():
    with pytest.raises(ValueError, match="`strategy` must be 'brute' or 'cell'; got 'shared'"):
        OptimizedDistance(strategy="shared")
    with pytest.raises(ValueError, match="NaN|finite"):
        OptimizedDistance()(torch.full((2, 3), float("nan")))
    with pytest.raises(TypeError, match="float32 or float64"):
        OptimizedDistance()(torch.zeros(2, 3, dtype=torch.float16))


FLAGS = "return_vecs", "loop", "include_transpose", "resize_to_fit", "long_edge_index", "use_periodic"


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_checked_where_they_are_used(name):
    """Models and their users assign them: any text would be true."""
    module = OptimizedDistance(max_num_pairs=-60, box=BOX)
    setattr(module, name, "False")
    with pytest.raises(TypeError, match=f"`{name}` must be True or False; got 'False' of type str"):
        module(atoms())
    expected = OptimizedDistance(max_num_pairs=-60, box=BOX)
    for flag in (True, False):
        setattr(module, name, np.bool_(flag))
        setattr(expected, name, flag)
        for mine, other in zip(module(atoms()), expected(atoms()), strict=True):
            assert mine is other is None or (mine.dtype == other.dtype and torch.equal(mine, other))


BAD_OPTIONS = [
    ("max_num_pairs", float("nan"), TypeError, "`max_num_pairs` must be an integer; got nan"),
    ("max_num_pairs", True, TypeError, "`max_num_pairs` must be an integer; got True"),
    ("max_num_pairs", 2.5, TypeError, "`max_num_pairs` must be an integer; got 2.5"),
    ("max_num_pairs", "x", TypeError, "`max_num_pairs` must be an integer; got 'x'"),
    ("cutoff_lower", 6.0, ValueError, "`cutoff_lower` must be below `cutoff_upper`, 5.0; got 6.0"),
    ("cutoff_lower", 5.0, ValueError, "`cutoff_lower` must be below `cutoff_upper`, 5.0; got 5.0"),
    ("strategy", "shared", ValueError, "`strategy` must be 'brute' or 'cell'; got 'shared'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_OPTIONS)
def test_options_are_checked_when_given_and_when_assigned(name, value, error, message):
    with pytest.raises(error, match=message):
        OptimizedDistance(**{name: value})
    module = OptimizedDistance()
    setattr(module, name, value)
    with pytest.raises(error, match=message):
        module(atoms())


def network(model, **more):
    torch.manual_seed(0)
    return create_model(
        {
            "model": model,
            "precision": 64,
            "embedding_dimension": 16,
            "num_layers": 2,
            "num_rbf": 8,
            "rbf_type": "expnorm",
            "trainable_rbf": False,
            "activation": "silu",
            "attn_activation": "silu",
            "num_heads": 4,
            "distance_influence": "both",
            "neighbor_embedding": True,
            "aggr": "add",
            "cutoff_lower": 0.0,
            "cutoff_upper": 5.0,
            "max_z": 20,
            "max_num_neighbors": 60,
            "equivariance_invariance_group": "O(3)",
            "derivative": True,
            "atom_filter": -1,
            "prior_model": None,
            "output_model": "Scalar",
            "output_mlp_num_layers": 0,
            "reduce_op": "add",
            **more,
        }
    )


@pytest.mark.parametrize("box", [None, BOX, BOXES], ids=["open", "one", "three"])
@pytest.mark.parametrize("model", ["tensornet", "equivariant-transformer", "transformer", "graph-network"])
def test_model(model, box):
    """Energies, forces, and the gradients of a loss on the forces in the weights, of a random network."""
    theirs = network(model)
    mine = replace_distances(copy.deepcopy(theirs))
    assert not any(isinstance(module, Theirs) for module in mine.modules())
    z = torch.randint(1, 9, (60,), generator=torch.Generator().manual_seed(1))
    results = []
    for net in (mine, theirs):
        energy, forces = net(z, atoms(), BATCH, box=box)
        parameters = [p for p in net.parameters() if p.requires_grad]
        grads = torch.autograd.grad(forces.square().sum(), parameters, allow_unused=True)
        results.append((energy, forces, *(grad for grad in grads if grad is not None)))
    assert len(results[0]) > 5
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)
    assert results[1][1].abs().max() > 0


def test_model_with_static_shapes_and_a_box_of_its_own():
    theirs = network("tensornet", static_shapes=True, box_vecs=BOX.tolist())
    mine = replace_distances(copy.deepcopy(theirs))
    assert mine.representation_model.distance.resize_to_fit is False
    mine.load_state_dict(theirs.state_dict())
    z = torch.full((60,), 6)
    for x, y in zip(mine(z, atoms()), theirs(z, atoms()), strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_copies():
    module = pickle.loads(pickle.dumps(OptimizedDistance(max_num_pairs=-60, return_vecs=True, box=BOX)))
    assert_same(module(atoms()), copy.deepcopy(module)(atoms()))


def test_recipe():
    names = run_recipe("TorchMD-Net")
    assert isinstance(names["network"].distance, OptimizedDistance)
    assert names["edge_index"].shape[1] == len(names["edge_vec"]) > 0
