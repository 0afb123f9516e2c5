"""Fixtures and hypothesis profiles shared by the whole suite."""

import os

import hypothesis
import pytest
import torch

import diffnl

hypothesis.settings.register_profile("default", max_examples=300, deadline=None)
hypothesis.settings.register_profile(
    "thorough",
    max_examples=20_000,
    deadline=None,
    # The gate is about new inputs, and a drawn batch of systems is large by hypothesis' standards.
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Thousands of tiny calls gain nothing from more threads, and crawl where other work shares the cores. That
# results do not depend on the number of threads has its own tests, which use the `threads` fixture.
torch.set_num_threads(1)


def why_no_gpu():
    """Why nothing can run on a GPU here, or None."""
    if not {"cuda", "hip"} & set(diffnl.build_info()["backends"]):
        return "diffnl was built without a GPU backend"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


@pytest.fixture(params=["cpu"] if why_no_gpu() else ["cpu", "cuda"])
def device(request):
    """Every device that this build and this machine can run."""
    return torch.device(request.param)


@pytest.fixture
def gpu():
    """A GPU, or a skip that says why there is none."""
    reason = why_no_gpu()
    if reason:
        pytest.skip(f"nothing ran on a GPU: {reason}")
    return torch.device("cuda")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def threads():
    """Sets torch's intra-op threads inside a test and puts the old number back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
