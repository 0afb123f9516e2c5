"""Options of a list: the forms they may have, and that each is checked wherever it is set."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import assert_equal_bits

import diffnl

R = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 1.5, 1.0]])
H = 4.0 * torch.eye(3)
GOOD = {"cutoff": 2.5, "full": True, "sorted": False, "capacity": None, "skin": 0.0}

BAD = {
    "cutoff_negative": ("cutoff", -3, ValueError, r"`cutoff` must be finite and > 0; got -3"),
    "cutoff_none": ("cutoff", None, TypeError, "`cutoff` must be a number; got None"),
    "cutoff_flag": ("cutoff", np.True_, TypeError, "`cutoff` must be a number; got True of type bool"),
    "cutoff_array": ("cutoff", np.ones(2), TypeError, "`cutoff` must be a number; got .* go into a tuple"),
    "cutoff_one_in_an_array": ("cutoff", torch.ones(1), TypeError, "`cutoff` must be a number"),
    "cutoff_complex": ("cutoff", torch.tensor(1j), TypeError, "`cutoff` must be a number"),
    "cutoff_second": ("cutoff", (3.0, -1.0), ValueError, "`cutoff` must be finite and > 0; got -1.0"),
    "full_word": ("full", "half", TypeError, "`full` must be True or False; got 'half' of type str"),
    "full_number": ("full", 1, TypeError, "`full` must be True or False; got 1 of type int"),
    "full_none": ("full", None, TypeError, "`full` must be True or False; got None"),
    "full_tensor": ("full", torch.ones(2), TypeError, r"`full` must be True or False; got a Tensor of shape"),
    "sorted_word": ("sorted", "no", TypeError, "`sorted` must be True or False; got 'no' of type str"),
    "sorted_integer": ("sorted", torch.tensor(0), TypeError, "`sorted` must be True or False; got 0"),
    "capacity_negative": ("capacity", np.int64(-1), ValueError, "`capacity` must be >= 0; got -1"),
    "capacity_number": ("capacity", torch.tensor(9.0), TypeError, "`capacity` must be an integer; got 9.0"),
    "capacity_flag": ("capacity", True, TypeError, "`capacity` must be an integer; got True of type bool"),
    "skin_negative": ("skin", -0.1, ValueError, "`skin` must be finite and >= 0; got -0.1"),
    "skin_nan": ("skin", np.float32("nan"), ValueError, "`skin` must be finite and >= 0; got nan"),
    "skin_word": ("skin", "1", TypeError, "`skin` must be a number; got '1' of type str"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_of_a_layer(name):
    """When it is made, and when they are assigned: the layer stays what it was."""
    option, value, error, message = BAD[name]
    with pytest.raises(error, match=message):
        diffnl.NeighborList(**GOOD | {option: value})
    layer = diffnl.NeighborList(**GOOD)
    with pytest.raises(error, match=message):
        setattr(layer, option, value)
    assert {key: getattr(layer, key) for key in GOOD} == GOOD


@pytest.mark.parametrize("name", [name for name in BAD if not name.startswith("skin")])
def test_bad_options_of_a_function(name):
    option, value, error, message = BAD[name]
    options = {key: GOOD[key] for key in ("cutoff", "full", "sorted", "capacity")} | {option: value}
    with pytest.raises(error, match=message):
        diffnl.neighbor_pairs(R, H, True, **options)
    if option in ("cutoff", "full", "sorted") and name != "cutoff_second":
        del options["capacity"]
        with pytest.raises(error, match=message):
            diffnl.reference.neighbor_pairs(R, H, True, **options)


def test_options_are_named():
    with pytest.raises(TypeError):
        diffnl.NeighborList(5.0, False)  # a bare False says nothing


def test_several_cutoffs_and_a_capacity_cannot_be_assigned_together():
    for made, later in (
        ({"cutoff": (2.0, 3.0)}, ("capacity", 9)),
        ({"cutoff": 2.0, "capacity": 9}, ("cutoff", (2, 3))),
    ):
        layer = diffnl.NeighborList(**made)
        with pytest.raises(ValueError, match="`capacity` must be None where there are several cutoffs"):
            setattr(layer, *later)


FORMS = {
    "python": lambda value: value,
    "numpy": lambda value: np.asarray(value)[()],
    "array": np.asarray,
    "tensor": torch.tensor,
}


@pytest.mark.parametrize("form", FORMS)
def test_scalars_of_all_kinds_are_options(form, device):
    """NumPy's and torch's are what a configuration or another computation leaves behind."""
    of = FORMS[form]
    given = {"cutoff": of(2.5), "full": of(False), "sorted": of(True), "capacity": of(500), "skin": of(0.25)}
    plain = {"cutoff": 2.5, "full": False, "sorted": True, "capacity": 500, "skin": 0.25}
    layer = diffnl.NeighborList(**given)
    assert {key: getattr(layer, key) for key in plain} == plain
    assert [type(getattr(layer, key)) for key in plain] == [float, bool, bool, int, float]
    where = R.to(device), H.to(device), True
    expected = diffnl.NeighborList(**plain)(*where)
    assert_equal_bits(layer(*where), expected)
    without_skin = {key: value for key, value in given.items() if key != "skin"}
    assert_equal_bits(diffnl.neighbor_pairs(*where, **without_skin), expected)
    assert diffnl.estimate_capacity(*where, of(2.5), full=of(False), skin=of(0.25), slack=of(0.5)) == 256


def test_integers_and_fractions_are_numbers():
    assert diffnl.NeighborList(3).cutoff == 3.0
    assert diffnl.NeighborList(Fraction(5, 2), skin=torch.tensor(1)).cutoff == 2.5
    assert diffnl.NeighborList((3, np.float32(1.5))).cutoff == (3.0, 1.5)


@pytest.mark.parametrize("option", ["cutoff", "skin"])
def test_an_option_that_requires_a_gradient_is_refused(option):
    """Which pairs there are has no derivative: to detach it in silence would train nothing."""
    value = torch.tensor(2.5, requires_grad=True)
    with pytest.raises(ValueError, match=rf"`{option}` must not require a gradient"):
        diffnl.NeighborList(**GOOD | {option: value})
    layer = diffnl.NeighborList(2.0)
    with pytest.raises(ValueError, match=rf"give the list {option}\.detach\(\)"):
        setattr(layer, option, value)


def test_a_cutoff_with_a_tangent_is_refused():
    def distances(cutoff):
        return diffnl.neighbor_pairs(R, None, None, cutoff).distances.sum()

    for transform in (torch.func.grad(distances), lambda c: torch.func.jvp(distances, (c,), (c,))):
        with pytest.raises(ValueError, match="`cutoff` must not require a gradient"):
            transform(torch.tensor(2.5))


def test_assigned_options_are_used():
    layer = diffnl.NeighborList(1.0)
    assert layer(R).mapping.shape[1] == 0
    layer.cutoff, layer.full, layer.sorted = 2.0, False, True
    assert_equal_bits(layer(R), diffnl.neighbor_pairs(R, None, None, 2.0, full=False, sorted=True))
    layer.capacity = 7
    assert layer(R).shifts.shape == (7, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_options_and_check_them(copied):
    options = {"cutoff": 2.5, "full": False, "sorted": True, "capacity": 40, "skin": 0.5}
    layer = copied(diffnl.NeighborList(**options))
    assert {key: getattr(layer, key) for key in options} == options
    with pytest.raises(ValueError, match="`cutoff`"):
        layer.cutoff = -1.0


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_flag_of_forces_and_stress_is_checked(value):
    positions = R.clone().requires_grad_()
    energy = diffnl.neighbor_pairs(positions, None, None, 3.0).distances.sum()
    with pytest.raises(TypeError, match="`create_graph` must be True or False"):
        diffnl.forces_and_stress(energy, positions, None, create_graph=value)
