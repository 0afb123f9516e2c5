"""Bad input and what is said of it: a small valid input, and the check of a message."""

import re

import pytest
import torch

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
