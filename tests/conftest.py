"""Fixtures and hypothesis profiles shared by the whole suite."""

import os

import ambient
import hypothesis
import pytest
import torch

import diffnl

ambient.start()

hypothesis.settings.register_profile("default", max_examples=300, deadline=None)
# For slow machinery, such as kernels that an emulator runs.
hypothesis.settings.register_profile("quick", max_examples=60, deadline=None)
hypothesis.settings.register_profile(
    "thorough",
    max_examples=20_000,
    deadline=None,
    # The gate is about new inputs, and a drawn batch of systems is large by hypothesis' standards.
    suppress_health_check=list(hypothesis.HealthCheck),
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
hypothesis.settings.load_profile(PROFILE)

# Thousands of tiny calls gain nothing from more threads, and crawl where other work shares the cores. That
# results do not depend on the number of threads has its own tests, which use the `threads` fixture.
torch.set_num_threads(1)


BACKENDS = diffnl.build_info()["backends"]
# A build for tests: an emulator runs the GPU kernels, which answer CPU tensors in the CPU backend's place.
EMULATED = BACKENDS == ["hostgpu"]
# Then tests take fewer steps and systems.
SLOW = EMULATED or PROFILE == "quick"


def seeds(count: int) -> range:
    """Seeds of a test that draws its own systems."""
    return range(1 if SLOW else count)


def pytest_configure(config):
    # torch's own, where matrix products run in a backward: its threads find the context on their own.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with ambient.around_a_test():
        return (yield)


def pytest_collection_modifyitems(items):
    ambient.skip_what_cannot_run(items)


def why_no_gpu():
    """Why nothing can run on a GPU here, or None."""
    if not {"cuda", "hip"} & set(BACKENDS):
        return "diffnl was built without a GPU backend"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


# Of the session, so that hypothesis may draw many examples on one device.
@pytest.fixture(scope="session", params=["cpu"] if why_no_gpu() else ["cpu", "cuda"])
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


@pytest.fixture
def second_gpu(gpu):
    """A GPU that is not the current one, or a skip."""
    if torch.cuda.device_count() < 2:
        pytest.skip("nothing ran on a second GPU: torch sees one")
    return torch.device("cuda", 1 - torch.cuda.current_device())


@pytest.fixture
def gpu_kernels(device):
    """Whether the GPU kernels answer tensors of `device`."""
    return device.type == "cuda" or EMULATED


@pytest.fixture
def cpu_backend():
    """Skips a test of the CPU backend in a build without it."""
    if EMULATED:
        pytest.skip("a test of the CPU backend: in this build an emulator runs the GPU kernels in its place")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def threads():
    """Sets torch's intra-op threads inside a test and puts the old number back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
