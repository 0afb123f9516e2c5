"""Which compiled libraries are loaded under which torch, and what is said of the others.

Libraries for GPUs are stand-ins here, compiled by g++: they hold the notes of real ones and register nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import diffnl
from diffnl import _load, _ops, _validate

PACKAGE = Path(diffnl.__file__).parent
OPS = Path(__file__).parents[1] / "csrc" / "ops.cpp"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles stand-ins with g++")

# `loaded()` says that a library has been loaded; `missing()` is a symbol that nothing has.
STAND_IN = """
#include <cstdio>
{notes}
extern "C" void diffnl_missing();
__attribute__((constructor)) static void say() {{ std::puts("loaded {name}"); std::fflush(stdout); {use} }}
"""
SCRIPT = """
import json, sys
import torch
torch.version.cuda, torch.version.hip = {cuda!r}, {hip!r}
sys.path.insert(0, {folder!r})
import diffnl
from diffnl import _ops
found = diffnl.NeighborList(2.0)(torch.tensor([[0.0, 0, 0], [1.0, 0, 0]]), None, False)
answer = {{"info": diffnl.build_info(), "pairs": found.mapping.shape[1], "paths": diffnl.library_paths(),
           "no_kernels": diffnl._load.no_kernels(), "linked": sorted(_ops.LINKED_DEVICES)}}
print(json.dumps(answer))
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package with the library of the CPU alone."""
    folder = tmp_path / "diffnl"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = Path(_load.CORE.path)
    (folder / library.name).symlink_to(library)
    return folder


def stand_in(package, backend, schemas=_load.CORE.schemas, use=""):
    """Puts diffnl/_{backend}.abi3.so there; loading it is told on standard output."""
    texts = {
        "diffnl_part": f"diffnl part;{backend};9.0,12.0+PTX;2.11.0;{schemas}",
        "diffnl_toolkit": "diffnl toolkit;CUDA 12090",
    }
    notes = "".join(f'[[gnu::used]] const char {name}[] = "{text}";\n' for name, text in texts.items())
    source = package.parent / f"{backend}.cpp"
    source.write_text(STAND_IN.format(notes=notes, name=backend, use=use))
    library = package / f"_{backend}.abi3.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True, timeout=120)
    return library


def imported(package, cuda=None, hip=None):
    """What a process finds whose torch says these versions: an answer, its parts, what was loaded."""
    script = SCRIPT.format(cuda=cuda, hip=hip, folder=str(package.parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=package.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    *loaded, answer = done.stdout.splitlines()
    answer = json.loads(answer)
    assert str(package) in answer["paths"][0]
    assert answer["pairs"] == 2, "the CPU works in any case"
    parts = {part["backend"]: part for part in answer["info"]["parts"]}
    return answer, parts, [line.removeprefix("loaded ") for line in loaded]


@needs_compiler
@pytest.mark.parametrize(
    ("cuda", "hip", "expected"),
    [
        (None, None, None),
        ("13.0", None, "cuda"),
        (None, "7.1", "hip"),
        ("12.4", "7.1", "hip"),
    ],
)
def test_torch_gets_the_library_it_was_built_for_and_no_other(package, cuda, hip, expected):
    libraries = {backend: stand_in(package, backend) for backend in ("cuda", "hip")}
    answer, parts, loaded = imported(package, cuda, hip)
    others = {"cuda", "hip"} - {expected}
    assert loaded == ([expected] if expected else [])
    assert parts[_load.CORE.backend]["loaded"] and not any(parts[name]["loaded"] for name in others)
    for name in others:
        assert "was not built for " + _load.NAMES[name] in parts[name]["reason"]
        assert parts[name]["archs"] == ["9.0", "12.0+PTX"] and parts[name]["path"] == str(libraries[name])
    if expected is None:
        assert answer["info"]["archs"] == [] and len(answer["paths"]) == 1
        return
    assert answer["info"]["backends"] == [_load.CORE.backend, expected]
    assert answer["info"]["archs"] == ["9.0", "12.0+PTX"] and "cuda" in answer["linked"]
    assert answer["paths"][1:] == [str(libraries[expected])]
    part = parts[expected]
    assert part["loaded"] and part["reason"] is None
    assert (part["toolkit"], part["torch"]) == ("CUDA 12.9", "2.11.0")


def left_out(answer, parts, backend):
    """The library is not used, and it is said why."""
    assert answer["info"]["backends"] == [_load.CORE.backend] and answer["info"]["archs"] == []
    assert "cuda" not in answer["linked"] and len(answer["paths"]) == 1
    reason = parts[backend]["reason"]
    assert not parts[backend]["loaded"] and reason in answer["no_kernels"]
    assert f"run `DIFFNL_BACKEND={backend} pip install --no-build-isolation .`" in answer["no_kernels"]
    return reason


@needs_compiler
def test_a_symbol_that_is_missing_is_named(package):
    library = stand_in(package, "cuda", use="diffnl_missing();")
    answer, parts, loaded = imported(package, cuda="13.0")
    reason = left_out(answer, parts, "cuda")
    assert loaded == [] and str(library) in reason and "undefined symbol: diffnl_missing" in reason


@needs_compiler
def test_kernels_of_other_schemas_are_not_loaded(package):
    """As where the library of the CPU was built anew and this one was not."""
    library = stand_in(package, "hip", schemas="00000000")
    answer, parts, loaded = imported(package, hip="7.1")
    reason = left_out(answer, parts, "hip")
    assert loaded == [] and f"{library} was built from other sources" in reason


@pytest.mark.parametrize("content", [None, b"no library, and no note in it"])
def test_a_library_that_is_missing_or_none(package, content):
    if content is not None:
        (package / "_cuda.abi3.so").write_bytes(content)
    answer, parts, _ = imported(package, cuda="13.0")
    reason = left_out(answer, parts, "cuda")
    assert ("there is no _cuda*.so in" in reason) == (content is None)
    assert ("other sources" in reason) == (content is not None)


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "_cuda.abi3.so").touch()
    assert _load.describe(str(tmp_path / "_cuda.abi3.so"), "cuda").schemas is None


def test_the_library_says_what_it_is():
    part = _load.describe(_load.CORE.path, "none")
    assert part.backend in ("cpu", "hostgpu") and re.match(r"\d+\.\d+", part.torch)
    assert part.archs == [] and part.toolkit is None
    assert part.schemas == f"{zlib.crc32(OPS.read_bytes()):08x}"


@pytest.mark.parametrize(
    ("version", "advice"), [("2.9.1+cu128", "Install a newer torch"), ("2.11.0", "Rebuild it")]
)
def test_a_torch_that_is_too_old_is_told_apart(monkeypatch, version, advice):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(_load, "load", lambda path: "undefined symbol: torch_call_dispatcher")
    with pytest.raises(ImportError, match=rf"under torch {re.escape(version)} .*dispatcher\. {advice}"):
        _load.load_core()


# ------------------------------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    ("archs", "arch", "expected"),
    [
        ("8.0 9.0", "9.0", True),
        ("8.0 9.0", "8.6", True),  # machine code of the same major architecture
        ("8.6 9.0", "8.0", False),
        ("8.0 9.0", "12.0", False),
        ("8.0 9.0+PTX", "12.0", True),
        ("8.0 9.0+PTX", "7.5", False),
        ("9.0a", "9.0", True),
        ("10.0a", "10.3", False),
        ("10.0f", "10.3", True),
        ("Hopper", "9.0", True),  # a name torch knows: nothing can be said
        ("gfx90a gfx1100", "gfx90a", True),
        ("gfx90a gfx1100", "gfx1103", False),
    ],
)
def test_architectures_that_a_library_serves(archs, arch, expected):
    assert _load.serves(archs.split(), arch) is expected


@pytest.fixture
def card(monkeypatch):
    """Pretends a card of an architecture, and a library of a backend for others."""

    def pretend(backend, archs, arch):
        kernels = _load.Part(backend, "somewhere", archs.split(), "CUDA 13.0", loaded=True)
        monkeypatch.setattr(_load, "KERNELS", kernels)
        monkeypatch.setattr(_load, "architecture", lambda device: arch)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")

    return pretend


def failed_launch(why):
    def operator(*_):
        raise RuntimeError(f"diffnl: the kernel `count` could not be launched: {why}")

    return _ops._call(operator, torch.zeros(2, 3))


NO_IMAGE = "no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("backend", "archs", "arch", "command"),
    [
        ("cuda", "8.0 9.0", "6.1", "`TORCH_CUDA_ARCH_LIST=6.1 pip install --no-build-isolation .`"),
        (
            "hip",
            "gfx90a gfx1100",
            "gfx1103",
            "`PYTORCH_ROCM_ARCH=gfx1103 pip install --no-build-isolation .`",
        ),
    ],
)
def test_a_card_the_library_has_no_code_for_is_named(card, backend, archs, arch, command):
    card(backend, archs, arch)
    with pytest.raises(RuntimeError, match="no code for Some Card") as caught:
        failed_launch(NO_IMAGE)
    message = str(caught.value)
    assert f"architecture is {arch}" in message and archs.replace(" ", ", ") in message and command in message
    assert NO_IMAGE in message


@pytest.mark.parametrize(
    "why",
    [
        "CUDA driver version is insufficient for CUDA runtime version",
        "the provided PTX was compiled with an unsupported toolchain.",
    ],
)
def test_a_driver_that_is_too_old_is_named(card, why):
    card("cuda", "8.0 9.0+PTX", "12.0")
    with pytest.raises(RuntimeError, match=r"driver of this machine is too old .* CUDA 13\.0: update it"):
        failed_launch(why)


@pytest.mark.parametrize(
    ("arch", "why"), [("9.0", NO_IMAGE), ("6.1", "an illegal memory access was encountered")]
)
def test_other_failures_are_left_as_they_are(card, arch, why):
    """A card that the library serves, or an error that has nothing to do with the card's architecture."""
    card("cuda", "8.0 9.0", arch)
    with pytest.raises(RuntimeError) as caught:
        failed_launch(why)
    assert str(caught.value) == f"diffnl: the kernel `count` could not be launched: {why}"


def test_tensors_on_a_gpu_without_kernels_are_told_why(monkeypatch):
    monkeypatch.setattr(_load, "KERNELS", _load.Part("hip", reason="it does not load: some symbol"))
    with FakeTensorMode():
        error = _validate.no_backend(torch.empty(2, 3, device="cuda"))
    assert isinstance(error, ValueError)
    assert "got tensors on cuda:0: torch" in str(error) and "it does not load: some symbol" in str(error)
    assert "DIFFNL_BACKEND=hip" in str(error)
