"""How the libraries are built: what setup.py chooses. The builds themselves: `make test`, `make hostgpu`."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import diffnl

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ["BACKEND", "SANITIZE", "WAVE"]
ARCHITECTURES = ["TORCH_CUDA_ARCH_LIST", "PYTORCH_ROCM_ARCH"]
HOMES = ["CUDA_HOME", "CUDA_PATH", "ROCM_HOME", "ROCM_PATH"]
READY = b"\x7fELF ... diffnl part;hip;gfx90a;2.11.0;00000000\0"  # what is looked at in a HIP library


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_diffnl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, in the checkout, with no variable of ours set."""
    pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    for name in VARIABLES:
        monkeypatch.delenv(f"DIFFNL_{name}", raising=False)
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)
    for name in ARCHITECTURES:
        monkeypatch.setenv(name, "")  # set, so that what setup.py puts there is undone
    module = load(ROOT / "setup.py")
    monkeypatch.setattr(module, "READY_HIP", Path("build/no/_hip.abi3.so"))  # `make hip` may have run here
    return module


def pretend(monkeypatch, setup, hip=None, cuda=None, rocm_home=None, cuda_home=None):
    """Lets setup.py see another torch and other toolkits, and fail if it looks for a GPU."""

    def looked(*_):
        raise AssertionError("looked for a GPU")

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(setup, "rocm_home", lambda: rocm_home)
    monkeypatch.setattr(setup, "cuda_home", lambda: cuda_home)
    for name in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, looked)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, "cpu"),
        ({"cuda": "13.0", "cuda_home": "/cuda"}, "cuda"),
        ({"cuda": "13.0"}, "cpu"),
        ({"cuda_home": "/cuda"}, "cpu"),
        ({"hip": "6.3", "rocm_home": "/rocm"}, "hip"),
        ({"hip": "6.3", "rocm_home": "/rocm", "cuda_home": "/cuda"}, "hip"),
        ({"hip": "6.3"}, "cpu"),
    ],
)
def test_backend_follows_torch_and_its_toolkit(setup, monkeypatch, capsys, there, expected):
    pretend(monkeypatch, setup, **there)
    assert setup.choose_backends() == ["cpu", *({expected} - {"cpu"})]
    # A GPU build of torch that gets a CPU backend is told why.
    gpu_torch = bool({"cuda", "hip"} & set(there))
    assert ("CPU backend only" in capsys.readouterr().err) == (gpu_torch and expected == "cpu")


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ({"cuda": "13.0"}, "nvcc is missing: install the CUDA toolkit, or set CUDA_HOME"),
        (
            {"hip": "7.1"},
            "hipcc is missing: install the ROCm toolkit, or set ROCM_HOME.*rocm-sdk path",
        ),
    ],
)
def test_a_compiler_that_is_missing_is_named(setup, monkeypatch, capsys, there, missing):
    """Not the torch for GPUs, which is there."""
    pretend(monkeypatch, setup, **there)
    if "hip" in there:
        monkeypatch.setenv("DIFFNL_BACKEND", "hip")
        with pytest.raises(SystemExit, match=f"DIFFNL_BACKEND=hip cannot be built: {missing}"):
            setup.choose_backends()
        monkeypatch.delenv("DIFFNL_BACKEND")
    assert setup.choose_backends() == ["cpu"]
    told = capsys.readouterr().err
    assert re.search(f"though torch .* is for GPUs\\. {missing}.*`python -m diffnl` shows", told), told
    assert "a ROCm build of torch" not in told


@pytest.mark.parametrize(
    ("variable", "version", "wanted"),
    [
        ("ROCM_HOME", "hip", ""),
        ("ROCM_PATH", "hip", ""),
        ("ROCM_HOME", "hip", "hip"),
        ("CUDA_HOME", "cuda", ""),
        ("CUDA_PATH", "cuda", ""),
        ("CUDA_HOME", "cuda", "cuda"),
        ("CUDA_HOME", None, "cuda"),  # a torch for CPUs, and perhaps another toolkit where CUDA's often is
    ],
)
def test_a_home_without_a_compiler_is_an_error(setup, monkeypatch, tmp_path, variable, version, wanted):
    backend = "hip" if variable.startswith("ROCM") else "cuda"
    for name in ("hip", "cuda"):
        monkeypatch.setattr(torch.version, name, "7.1" if name == version else None)
        monkeypatch.setattr(setup, "ROCM_HOME" if name == "hip" else "CUDA_HOME", None)
    monkeypatch.setenv("DIFFNL_BACKEND", wanted)
    monkeypatch.setenv(variable, str(tmp_path))
    compiler = {"hip": "hipcc", "cuda": "nvcc"}[backend]
    with pytest.raises(SystemExit, match=rf"{variable} must name .* bin/{compiler}; got '{tmp_path}'"):
        setup.choose_backends()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / compiler).touch()
    assert setup.choose_backends() == ["cpu", backend]
    assert getattr(setup, {"hip": "rocm_home", "cuda": "cuda_home"}[backend])() == str(tmp_path)


def test_a_home_that_torch_supposes_may_have_no_compiler(setup, monkeypatch, tmp_path, capsys):
    """As /usr/local/cuda in containers that only run programs: nothing can be compiled, and that is right."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(setup, "ROCM_HOME", str(tmp_path))
    assert setup.choose_backends() == ["cpu"] and "hipcc is missing" in capsys.readouterr().err


def test_a_home_that_is_not_used_is_not_looked_at(setup, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonsense")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("DIFFNL_BACKEND", "cpu")
    assert setup.choose_backends() == ["cpu"]


@pytest.mark.parametrize(
    ("wanted", "there", "expected"),
    [
        ("cpu", {"cuda": "13.0", "cuda_home": "/cuda"}, ["cpu"]),
        ("hostgpu", {"cuda": "13.0", "cuda_home": "/cuda"}, ["hostgpu"]),
        ("cuda", {"cuda_home": "/cuda"}, ["cpu", "cuda"]),  # with the headers of a torch for CPUs
        ("hip", {"hip": "7.1", "rocm_home": "/rocm"}, ["cpu", "hip"]),
        ("HIP", {"hip": "7.1", "rocm_home": "/rocm"}, ["cpu", "hip"]),
        ("Cpu", {}, ["cpu"]),
    ],
)
def test_backend_can_be_chosen(setup, monkeypatch, wanted, there, expected):
    pretend(monkeypatch, setup, **there)
    monkeypatch.setenv("DIFFNL_BACKEND", wanted)
    assert setup.choose_backends() == expected


def test_a_wheel_takes_the_hip_library_that_is_ready(setup, monkeypatch, tmp_path):
    """Where there is no ROCm, and several backends go into one wheel."""
    pretend(monkeypatch, setup, cuda_home="/cuda")
    monkeypatch.setenv("DIFFNL_BACKEND", "cuda,hip")
    monkeypatch.setattr(setup, "READY_HIP", tmp_path / "_hip.abi3.so")
    with pytest.raises(SystemExit, match="DIFFNL_BACKEND=hip needs"):
        setup.choose_backends()
    (tmp_path / "_hip.abi3.so").write_bytes(READY)
    assert setup.choose_backends() == ["cpu", "cuda", "hip"]
    ready = setup.extension("hip")
    distribution = pytest.importorskip("setuptools").Distribution
    build = setup.Build(distribution({"name": "diffnl", "ext_modules": [ready]}))
    build.build_lib, build.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    build.ensure_finalized()
    build.run()
    assert (tmp_path / "lib" / "diffnl" / "_hip.abi3.so").read_bytes() == READY


@pytest.mark.parametrize("content", [b"", b"junk", b"\x7fELF of something else", READY[4:]])
def test_a_ready_library_that_is_none_is_an_error(setup, monkeypatch, tmp_path, content):
    pretend(monkeypatch, setup)
    monkeypatch.setattr(setup, "READY_HIP", tmp_path / "_hip.abi3.so")
    (tmp_path / "_hip.abi3.so").write_bytes(content)
    with pytest.raises(SystemExit, match="must be diffnl's HIP library.*run `make hip` again"):
        setup.extension("hip")


@pytest.mark.parametrize("name", ["scan_gpu.hip", "gpu.h", "ops.cpp", "skin_gpu.cpp"])
def test_a_ready_library_older_than_its_sources_is_an_error(setup, monkeypatch, tmp_path, name):
    pretend(monkeypatch, setup)
    library = tmp_path / "_hip.abi3.so"
    monkeypatch.setattr(setup, "READY_HIP", library)
    library.write_bytes(READY)
    newest = max(path.stat().st_mtime for path in setup.files_of("hip"))
    os.utime(library, (newest, newest))
    assert setup.extension("hip").sources == [str(library)]
    monkeypatch.setattr(setup, "files_of", lambda backend: [tmp_path / name])
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (newest + 1, newest + 1))
    with pytest.raises(SystemExit, match=rf"is older than .*{re.escape(name)}: run `make hip` again"):
        setup.extension("hip")


def test_files_that_the_hip_library_is_built_from(setup):
    names = {path.name for path in setup.files_of("hip")}
    assert {"ops.cpp", *setup.SOURCES["hip"], "gpu.h", "part.h", "pair_geometry.h"} <= names
    assert not {"ops_cpu.cpp", "tile.cpp", "tile.h", "neighbors_nvcc.cu"} & names


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cuda", "CUDA_HOME names its folder"),
        ("hip", "ROCM_HOME names its folder.*rocm-sdk path --root"),
        ("gpu", "must be cpu, cuda or hip, or cuda,hip .*; got 'gpu'"),
        ("cpu,hostgpu", "must be cpu, cuda or hip, or cuda,hip .*; got 'cpu,hostgpu'"),
    ],
)
def test_a_backend_that_cannot_be_built_is_an_error(setup, monkeypatch, wanted, message):
    pretend(monkeypatch, setup)
    monkeypatch.setenv("DIFFNL_BACKEND", wanted)
    with pytest.raises(SystemExit, match=message) as caught:
        setup.choose_backends()
    assert "hostgpu" not in str(caught.value).partition("; got")[0], "it is for tests"


def test_every_source_belongs_to_a_backend(setup):
    named = {name for names in setup.SOURCES.values() for name in names}
    assert named == {path.name for path in Path("csrc").iterdir() if path.suffix in (".cpp", ".cu", ".hip")}
    assert set(setup.KERNELS) == {name for name in named if name.endswith(".hip")}
    # nvcc takes the kernels through the .cu, hipcc each by itself; neither compiles the other's.
    included = re.findall(r'#include "(\w+\.hip)"', Path("csrc/neighbors_nvcc.cu").read_text())
    assert sorted(included) == sorted(setup.KERNELS)
    for backend, ours, others in [("cuda", ".cu", ".hip"), ("hip", ".hip", ".cu")]:
        suffixes = {Path(name).suffix for name in setup.SOURCES[backend]}
        assert ours in suffixes and others not in suffixes
        # What registers kernels, and no schema.
        assert not set(setup.SOURCES["cpu"]) & set(setup.SOURCES[backend])


@pytest.mark.parametrize("backend", ["cpu", "cuda", "hip", "hostgpu"])
def test_no_compiler_may_fuse_multiply_and_add(setup, backend):
    assert "-ffp-contract=off" in setup.cxx_flags(backend, [])
    device = setup.device_flags(backend)
    if backend == "cuda":
        assert "-fmad=false" in device and "--compiler-options=-ffp-contract=off" in device
    if backend == "hip":
        assert "-ffp-contract=off" in device


@pytest.mark.parametrize("backend", ["cpu", "cuda", "hip", "hostgpu"])
def test_files_are_named_without_folders_of_this_machine(setup, monkeypatch, backend):
    maps = [
        f"-fmacro-prefix-map={ROOT}/=",
        f"-fmacro-prefix-map={Path(torch.__file__).parent}/include/=torch/include/",
    ]
    flags = setup.cxx_flags(backend, [])
    assert [flag for flag in flags if "prefix-map" in flag] == maps
    expected = {"cuda": [f"--compiler-options={flag}" for flag in maps], "hip": maps}.get(backend, [])
    assert [flag for flag in setup.device_flags(backend) if "prefix-map" in flag] == expected
    assert "-lineinfo" not in setup.device_flags(backend), "names sources by their whole paths"


def test_libraries_hold_no_path_of_the_machine_that_built_them():
    """Those in diffnl's folder: whoever has not built them since setup.py maps paths builds them again."""
    libraries = sorted(Path(diffnl.__file__).parent.glob("_*.so"))
    assert libraries
    for library in libraries:
        texts = re.findall(rb"[\x20-\x7e]{8,}", library.read_bytes())
        named = [text for text in texts if re.search(rb"(csrc|include)/.*\.(h|cpp|hip|cu)", text)]
        paths = [text.decode() for text in named if re.search(rb"(^|[ =\"'])/", text)]
        assert not paths, f"{library} holds {paths}"
        assert any(text == b"csrc/ops.cpp" for text in named) or not library.name.startswith("_C")


def test_rocm_architectures(setup, monkeypatch):
    pretend(monkeypatch, setup)
    assert setup.architectures("hip") == setup.ROCM_ARCHS, "no torch to ask"
    assert os.environ["PYTORCH_ROCM_ARCH"] == ";".join(setup.ROCM_ARCHS)
    for given in ("gfx90a;gfx1030", "gfx90a gfx1030", "gfx90a, gfx1030;"):
        monkeypatch.setenv("PYTORCH_ROCM_ARCH", given)
        assert setup.architectures("hip") == ["gfx90a", "gfx1030"]
        assert os.environ["PYTORCH_ROCM_ARCH"] == "gfx90a;gfx1030"
    assert '-DDIFFNL_ARCHS="gfx90a,gfx1030"' in setup.cxx_flags("hip", ["gfx90a", "gfx1030"])


@pytest.mark.parametrize("says", ["get_arch_list", "_cuda_getArchFlags"])
def test_rocm_architectures_are_those_of_torch(setup, monkeypatch, says):
    """A ROCm torch says what it was built for without a GPU, up to 2.12 by its private name alone."""
    pretend(monkeypatch, setup, hip="7.1", rocm_home="/rocm")
    built_for = ["gfx906", "gfx90a:xnack-", "gfx90a:xnack+", "gfx1151"]
    public = built_for if says == "get_arch_list" else []
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: public)
    private = None if public else " ".join(built_for)
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: private, raising=False)
    assert setup.architectures("hip") == ["gfx906", "gfx90a", "gfx1151"]
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx1030")
    assert setup.architectures("hip") == ["gfx1030"]


@pytest.mark.parametrize("has_the_name", [True, False])
def test_rocm_architectures_of_a_torch_that_does_not_say(setup, monkeypatch, has_the_name):
    pretend(monkeypatch, setup, hip="7.1", rocm_home="/rocm")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    if has_the_name:
        monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: None, raising=False)
    else:
        monkeypatch.delattr(torch._C, "_cuda_getArchFlags", raising=False)
    assert setup.architectures("hip") == setup.ROCM_ARCHS


def test_cuda_architectures_are_those_nvcc_knows(setup, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\nsm_121\\n'\n")
    nvcc.chmod(0o755)
    pretend(monkeypatch, setup, cuda_home=str(tmp_path))
    assert setup.architectures("cuda") == ["7.5", "8.0", "9.0+PTX"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 12.1+PTX")
    assert setup.architectures("cuda") == ["9.0", "12.1+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    nvcc.write_text("#!/bin/sh\necho sm_300\n")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        setup.architectures("cuda")


@pytest.mark.parametrize(
    ("release", "expected"),
    [("12.6", []), ("12.8", ["--compress-mode=size"]), ("13.0", ["--compress-mode=size"])],
)
def test_machine_code_is_compressed_where_nvcc_can(setup, monkeypatch, tmp_path, release, expected):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    pretend(monkeypatch, setup, cuda_home=str(tmp_path))
    assert setup.compression() == expected


def test_hip_build_leaves_the_sources_to_torch_as_they_are(setup, monkeypatch):
    monkeypatch.setattr(setup, "include_paths", lambda kind: [f"/rocm/{kind}"])  # there is no ROCm to ask
    before = sorted(Path("csrc").iterdir())
    extension = setup.extension("hip")
    assert extension.sources == [f"csrc/{name}" for name in setup.SOURCES["hip"]]
    # HIP's runtime is the one that torch's library brings, not one named at link time.
    assert "-ltorch_hip" in extension.extra_link_args and "amdhip64" not in extension.libraries
    assert sorted(Path("csrc").iterdir()) == before, "hipify ran over csrc/"


def test_cuda_build_brings_its_runtime(setup, monkeypatch, tmp_path):
    """And needs libtorch, whatever the linker leaves out by default."""
    pretend(monkeypatch, setup, cuda_home=str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(setup, "compression", lambda: [])
    with pytest.raises(SystemExit, match="libcudart_static"):
        setup.extension("cuda")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    extension = setup.extension("cuda")
    assert extension.name == "diffnl._cuda" and not {"cudart", "torch_cuda", "c10_cuda"} & set(
        extension.libraries
    )
    flags = extension.extra_link_args
    assert f"-L{tmp_path}/lib" in flags and "-lcudart_static" in flags
    assert flags.index("-Wl,--no-as-needed") + 1 == flags.index("-ltorch")


def test_hostgpu_does_not_pass_for_the_cpu_backend(setup, monkeypatch):
    monkeypatch.setenv("DIFFNL_WAVE", "64")
    extension = setup.extension("hostgpu")
    flags = extension.extra_compile_args["cxx"]
    assert '-DDIFFNL_BACKEND="hostgpu"' in flags and "-DDIFFNL_WAVE=64" in flags
    assert "csrc/ops_cpu.cpp" not in extension.sources, "registers the CPU backend"
    wrappers = [Path(name).read_text() for name in extension.sources if name.startswith("build")]
    assert wrappers == [f'#include "{name}"\n' for name in setup.KERNELS]
    monkeypatch.setenv("DIFFNL_WAVE", "48")
    with pytest.raises(SystemExit, match="DIFFNL_WAVE must be 32 or 64"):
        setup.extension("hostgpu")


@pytest.mark.parametrize(
    ("version", "stays"),
    [
        ("2.11.0+rocm7.0", True),
        ("2.10.0+cu126", True),
        ("2.10.0a0+b558c98.nv25.11", True),
        ("2.9.1+cu128", False),
    ],
)
def test_pip_leaves_the_torch_that_is_there(tmp_path, version, stays):
    """pip itself decides, offered a newer torch as PyPI offers one."""
    pytest.importorskip("pip")
    installed = tmp_path / "installed" / f"torch-{version}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    offered = tmp_path / "offered" / "torch-9.9.0-py3-none-any.whl"
    offered.parent.mkdir()
    with zipfile.ZipFile(offered, "w") as wheel:
        info = "torch-9.9.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    dependency = re.search(r'^dependencies = \["(.+)"\]', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "--find-links",
        offered.parent,
    ]
    done = subprocess.run(
        [*command, dependency],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(installed.parent), "PIP_CONFIG_FILE": os.devnull},
    )
    assert ("Would install torch-9.9.0" in done.stdout) == (not stays), done.stdout
