"""What a program without Python needs: the library, its CMake config, an exported potential.

`make deploy` builds and runs the C++ program.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from systems import TRICLINIC, cubic, scatter, tensor

import diffnl

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"


@pytest.fixture(scope="module")
def example():
    """examples/deploy/export.py as a module."""
    pytest.importorskip("e3nn")
    pytest.importorskip("ase")
    spec = importlib.util.spec_from_file_location("deploy_export", DEPLOY / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_library_registers_the_operators_by_itself():
    """In a process that has not imported diffnl."""
    code = (
        f"import torch; torch.ops.load_library({diffnl.library_path()!r}); "
        "print(torch.ops.diffnl.neighbor_pairs.default)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "diffnl.neighbor_pairs.default" in done.stdout


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
needs_torchs_compiler = pytest.mark.skipif(
    torch.version.cuda is not None and shutil.which(os.environ.get("CUDACXX", "nvcc")) is None,
    reason="torch's own CMake config looks for the compiler of its CUDA, and there is none",
)


def configure(folder, prefix):
    """CMake's answer to a project that wants diffnl."""
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(wants LANGUAGES CXX)\nfind_package(diffnl REQUIRED)\n"
        "get_target_property(links diffnl::diffnl INTERFACE_LINK_LIBRARIES)\nmessage(STATUS links=${links})\n"
    )
    command = ["cmake", "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    return subprocess.run(command, capture_output=True, text=True)


@needs_cmake
@needs_torchs_compiler
def test_cmake_finds_the_package(tmp_path):
    done = configure(tmp_path, diffnl.cmake_prefix_path())
    assert done.returncode == 0, done.stderr
    libraries = ",".join(str(Path(path).resolve()) for path in diffnl.library_paths())
    assert f"--no-as-needed,{libraries},--as-needed" in done.stdout


# What the package finds of torch: its own config would find CUDA and more.
TORCH_CONFIG = """
set(TORCH_INSTALL_PREFIX "{prefix}")
set(TORCH_LIBRARIES torch)
set(Torch_FOUND TRUE)
"""


@needs_cmake
@pytest.mark.parametrize("there", ["_cuda.abi3.so", "_hip.abi3.so"])
def test_cmake_links_the_kernels_for_the_gpus_of_torch(tmp_path, there):
    """A CUDA torch; a library for it, or for AMD alone."""
    package = tmp_path / "diffnl"
    shutil.copytree(Path(diffnl.library_path()).parent / "cmake", package / "cmake")
    for library in ("_C.abi3.so", there):
        (package / library).touch()
    torch_folder = tmp_path / "torch"
    (torch_folder / "lib").mkdir(parents=True)
    (torch_folder / "lib" / "libtorch_cuda.so").touch()
    (torch_folder / "TorchConfig.cmake").write_text(TORCH_CONFIG.format(prefix=torch_folder))
    project = tmp_path / "project"
    project.mkdir()
    done = configure(project, f"{package};{torch_folder}")
    assert done.returncode == 0, done.stderr
    expected = f"{package}/_C.abi3.so" + (f",{package}/{there}" if there.startswith("_cuda") else "")
    assert f"--no-as-needed,{expected},--as-needed" in done.stdout
    assert ("there is no _cuda*.so" in " ".join(done.stderr.split())) == there.startswith("_hip")


@needs_cmake
@needs_torchs_compiler
def test_cmake_says_what_is_missing(tmp_path):
    """A package folder without the compiled library."""
    config = tmp_path / "diffnl" / "cmake" / "diffnlConfig.cmake"
    config.parent.mkdir(parents=True)
    shutil.copy(Path(diffnl.library_path()).parent / "cmake" / "diffnlConfig.cmake", config)
    project = tmp_path / "project"
    project.mkdir()
    done = configure(project, f"{config.parents[1]};{torch.utils.cmake_prefix_path}")
    assert done.returncode != 0
    assert "there must be one compiled library" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def potential(example):
    """One of oxygen and silicon, in float64, that has not been trained."""
    from mlip.calculator import build_potential
    from mlip.model import ModelConfig

    torch.manual_seed(7)
    config = ModelConfig(species=(8, 14), channels=2, reference_energies=(-1.0, 2.0), num_neighbors=40.0)
    return build_potential(config, "cpu", torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def program(example, potential):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, in its own export
        return example.trace(potential).module()


FRAMES = {
    "skewed": (scatter(12, TRICLINIC, seed=1, low=-1.0, high=2.0), TRICLINIC, (True, True, True)),
    "slab": (scatter(25, cubic(9.0), seed=2), cubic(9.0), (True, True, False)),
    "without pairs": (tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 20.0]]), cubic(9.0), (False, False, False)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_the_exported_graph_gives_pythons_values(example, potential, program, name):
    """Other numbers of atoms and pairs than the graph was traced with, other cells and other axes."""
    positions, cell, pbc = FRAMES[name]
    frame = positions, tensor(cell), torch.tensor(pbc), torch.arange(len(positions)) % 2
    energy, forces, _ = expected = example.evaluate(potential, *frame)
    assert torch.isfinite(energy) and (forces.abs().max() > 1e-3) == (name != "without pairs")
    for ours, theirs in zip(program(*frame), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
