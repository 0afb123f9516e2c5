"""What a program without Python needs: the library, its CMake config, an exported potential.

`make deploy` builds and runs the C++ program.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffnl

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"


@pytest.fixture(scope="module")
def example():
    """examples/deploy/export.py as a module."""
    spec = importlib.util.spec_from_file_location("deploy_export", DEPLOY / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_library_registers_the_operators_by_itself():
    """In a process that has not imported diffnl."""
    code = (
        f"import torch; torch.ops.load_library({diffnl.library_path()!r}); "
        "print(torch.ops.diffnl.build_info(), torch.ops.diffnl.neighbor_pairs.default)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "diffnl.neighbor_pairs.default" in done.stdout


def configure(folder, prefix):
    """CMake's answer to a project that wants diffnl."""
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(wants LANGUAGES CXX)\nfind_package(diffnl REQUIRED)\n"
        "get_target_property(links diffnl::diffnl INTERFACE_LINK_LIBRARIES)\nmessage(STATUS links=${links})\n"
    )
    command = ["cmake", "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_cmake_finds_the_package(tmp_path):
    done = configure(tmp_path, diffnl.cmake_prefix_path())
    assert done.returncode == 0, done.stderr
    assert f"--no-as-needed,{Path(diffnl.library_path()).resolve()}" in done.stdout.replace("/cmake/..", "")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own export
def test_the_exported_graph_serves_other_systems(example):
    """Traced on one frame, it gives Python's values on another: other atoms, other pairs, other axes."""
    potential = example.Potential()
    frames = example.make_frames()
    program = example.trace(potential, frames["slab"])
    for frame in frames.values():
        for ours, theirs in zip(program.module()(*frame), example.evaluate(potential, *frame), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
