"""The HIP library of diffnl, linked and loaded on a machine that has no ROCm.

The library names torch's own HIP library, libtorch_hip.so, as the one it needs, and no libamdhip64: that is
whichever torch brings, .so.6 under ROCm 6, .so.7 under ROCm 7, or a copy without a number. Where there is no
ROCm, stand-ins for both libraries are made here.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hip_toolchain import OUT, CheckFailed, run, setup_module

TORCH_HIP = "libtorch_hip.so"
STREAM_CALL = "aoti_torch_get_current_cuda_stream"

# ------------------------------------------------------------------------------------------- link


def hip_symbols(objects: list[Path]) -> list[str]:
    """The functions of HIP's runtime that the objects call."""
    names = re.findall(r"\bU (\S+)", run("nm", "--undefined-only", *objects))
    return sorted({name for name in names if re.match(r"(__)?hip[A-Z]", name)})


def make_library(path: Path, source: str, *flags) -> None:
    """A small shared library of C source, under the name `path` has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_name(f"{path.name}.c")
    text.write_text(source)
    # What a stand-in names as a dependency it keeps, called or not.
    how = ["-shared", "-fPIC", "-w", f"-Wl,--no-as-needed,-soname,{path.name}"]
    run("gcc", *how, text, *flags, "-o", path)


def link(objects: list[Path], library: Path) -> list[str]:
    """Links `library` as setup.py does on a ROCm torch; returns the functions of HIP that it calls."""
    from torch.utils.cpp_extension import library_paths

    symbols = hip_symbols(objects)
    stub = library.parent.parent / "stub" / TORCH_HIP
    make_library(stub, "".join(f"void {name}(void) {{}}\n" for name in symbols))
    library.parent.mkdir(parents=True, exist_ok=True)
    folders = [f"-L{path}" for path in [*library_paths(), stub.parent]]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", *setup_module().HIP_LINK]
    run("g++", "-shared", "-s", *objects, *folders, *libraries, "-o", library)

    # The loader resolves every symbol against what the library names as its dependencies.
    search = {**os.environ, "LD_LIBRARY_PATH": ":".join([*library_paths(), str(stub.parent)])}
    result = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, env=search)
    report = result.stdout + result.stderr
    if result.returncode or "not found" in report:
        raise CheckFailed(f"ldd -r {library}:\n{report}")
    undefined = set(re.findall(r"undefined symbol: (\S+)", report))
    if undefined != {STREAM_CALL}:
        raise CheckFailed(
            f"{library} must leave exactly {STREAM_CALL} undefined, and leaves: "
            f"{', '.join(sorted(undefined)) or 'nothing'}. Anything else is missing from the sources or from "
            "torch's stable ABI; without this call kernels miss torch's current stream."
        )
    check_needs(run("readelf", "--wide", "--dynamic", "--version-info", library), library)
    return symbols


def check_needs(report: str, library: Path) -> None:
    """`report`: what `readelf --dynamic --version-info` prints of the library."""
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", report)
    versions = sorted(set(re.findall(r"Name: (hip_\S+)", report)))
    numbered = [name for name in needed if name.startswith("libamdhip64")]
    if TORCH_HIP not in needed or numbered or versions:
        raise CheckFailed(
            f"{library} must need {TORCH_HIP}, no libamdhip64 (torch brings it, of ROCm 6 or 7) and no "
            f"version of its symbols. It needs {', '.join([*needed, *versions])}. See HIP_LINK in setup.py."
        )


def check_runtime_has(symbols: list[str], runtime: Path) -> None:
    """HIP's headers rename functions that change (hipGetDevicePropertiesR0600); what an old runtime exports,
    later ones do."""
    exported = set(re.findall(r"\bT (\w+)", run("nm", "--dynamic", "--defined-only", runtime)))
    missing = [name for name in symbols if name not in exported]
    if missing:
        raise CheckFailed(f"{runtime} lacks {', '.join(missing)}: an older ROCm would not load the library")


# ------------------------------------------------------------------------------- torch and HIP, not there

# The kernels are registered when the library is loaded; everything else is called by launches.
RUNTIME = """
static int kernels;
int standin_kernels(void) { return kernels; }
static void* handle;
void** __hipRegisterFatBinary(const void* data) { return &handle; }
void __hipRegisterFunction(void** modules, const void* host, char* device, const char* name) { ++kernels; }
"""
# Versions such as AMD's runtimes have.
VERSIONS = "hip_4.2 { global: __hip*; standin_*; };\nhip_5.0 { global: hip*; } hip_4.2;\n"


def make_runtime(path: Path, symbols: list[str]) -> None:
    """A libamdhip64 that counts the kernels that are registered with it."""
    others = [name for name in symbols if f"{name}(" not in RUNTIME]
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = path.with_name("versions.map")
    versions.write_text(VERSIONS)
    source = RUNTIME + "".join(f"int {name}(void) {{ return 0; }}\n" for name in others)
    make_library(path, source, f"-Wl,--version-script={versions}")


def make_torch_hip(folder: Path, runtime: str, *, stream_call: bool = True) -> Path:
    """torch's HIP library, which depends on the library `runtime`, in `folder` or on the linker's path."""
    source = f"int {STREAM_CALL}(int device, void** stream) {{ __builtin_abort(); }}\n" if stream_call else ""
    make_library(folder / TORCH_HIP, source, f"-L{folder}", f"-l:{runtime}")
    return folder


# -------------------------------------------------------------------------------------------- load

USE = """
import ctypes
import re
import torch
torch.version.hip = {version!r}
import diffnl

assert {folder!r} in diffnl.__file__, diffnl.__file__
assert diffnl.build_info()["backends"] == ["cpu", "hip"], diffnl.build_info()
assert diffnl.build_info()["archs"] == {archs!r}, diffnl.build_info()
operators = {{name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffnl::")}}
assert len(operators) > 3, operators
of_the_cpu = {{"compact_candidates", "merge_candidates", "candidates_margins", "select_candidates"}}
of_the_cpu |= {{"neighbor_lists"}}
for name in operators:
    key = "CPU" if name.removeprefix("diffnl::") in of_the_cpu else "CUDA"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)

runtimes = set(re.findall(r"libamdhip64\\.so\\.\\d+", open("/proc/self/maps").read()))
assert runtimes == {{{runtime!r}}}, runtimes
runtime = ctypes.CDLL({runtime!r})
{expect}

positions = torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4.0
cell, pbc = 4.0 * torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.bool)
mapping, shifts, vectors = torch.ops.diffnl.neighbor_pairs(positions, cell, pbc, None, 3.0, True, True)
oracle = diffnl.reference.neighbor_pairs(positions, cell[0], True, 3.0)
assert mapping.shape[1] > 20 and torch.equal(mapping, oracle.mapping) and torch.equal(shifts, oracle.shifts)
assert torch.equal(vectors, oracle.vectors)
"""
# No device, said by HIP's own runtime.
NO_DEVICE = """
count = ctypes.c_int(-1)
error = runtime.hipGetDeviceCount(ctypes.byref(count))
assert error == 100, f"hipGetDeviceCount returned {error}, not hipErrorNoDevice (100)"
"""
REGISTERED = """
registered = runtime.standin_kernels()
assert registered == {kernels}, f"{{registered}} kernels are registered, of {kernels}"
"""


def environment(libraries: Path | None) -> dict[str, str]:
    """Of a process that finds `libraries`, and no AMD GPU where there happens to be one."""
    hidden = {**os.environ, "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}
    hidden.pop("LD_LIBRARY_PATH", None)
    return hidden if libraries is None else {**hidden, "LD_LIBRARY_PATH": str(libraries.resolve())}


# What diffnl says of its HIP library, and whether the CPU works without it.
REFUSED = """
import json
import torch
torch.version.hip = "7.1"
import diffnl
assert diffnl.neighbor_pairs(torch.zeros(2, 3), None, None, 1.0).mapping.shape == (2, 2)
print(json.dumps([part for part in diffnl.build_info()["parts"] if part["backend"] == "hip"]))
"""


def check_use(package: Path, archs: list[str], libraries: Path, runtime: str, expect: str) -> None:
    """`package` loads its HIP library where torch's is the one in `libraries`, and its CPU backend works."""
    script = package.parent / "use.py"  # beside the package, so that it imports this one
    version = f"{runtime.rpartition('.')[2]}.0"
    text = USE.format(
        folder=str(package.parent), archs=archs, runtime=runtime, expect=expect, version=version
    )
    script.write_text(text)
    run(sys.executable, script, env=environment(libraries))


def check_refusal(package: Path, libraries: Path | None, missing: str) -> None:
    """Where `missing` is, the CPU works, and the reason why the HIP library does not load names it."""
    script = package.parent / "refused.py"
    script.write_text(REFUSED)
    (part,) = json.loads(run(sys.executable, script, env=environment(libraries)))
    if part["loaded"] or missing not in (part["reason"] or ""):
        raise CheckFailed(
            f"Without {missing} the HIP library must not load, for that reason, and did: {part}"
        )


@functools.cache
def build_core() -> Path:
    """The library of the CPU, as setup.py makes it."""
    folder = OUT / "core"
    flags = ["--build-lib", folder, "--build-temp", folder / "objects"]
    run(sys.executable, "setup.py", "-q", "build_ext", *flags, env={**os.environ, "DIFFNL_BACKEND": "cpu"})
    return next(folder.glob("diffnl/_C*.so"))


def make_package(library: Path) -> Path:
    """All of diffnl around a HIP library: the modules, and the library of the CPU."""
    for part in [*Path("diffnl").glob("*.py"), build_core()]:
        shutil.copy(part, library.parent)
    return library.parent


def load_with_debian_runtime(library: Path, archs: list[str]) -> None:
    """HIP 5.2's own runtime is there: it takes the library's code objects, and finds no device."""
    package = make_package(library)
    libraries = make_torch_hip(library.parent.parent / "libraries-5", "libamdhip64.so.5")
    check_use(package, archs, libraries, "libamdhip64.so.5", NO_DEVICE)


def load_with_standins(library: Path, archs: list[str], symbols: list[str], kernels: int) -> None:
    """Under torches of ROCm 6 and 7, and under ones that lack something."""
    package = make_package(library)
    folder = library.parent.parent
    for number in (6, 7):
        runtime = f"libamdhip64.so.{number}"
        libraries = folder / f"libraries-{number}"
        make_runtime(libraries / runtime, symbols)
        make_torch_hip(libraries, runtime)
        check_use(package, archs, libraries, runtime, REGISTERED.format(kernels=kernels))
        missing = next(name for name in symbols if name.startswith("hip"))
        make_runtime(folder / "lacking" / runtime, [name for name in symbols if name != missing])
        check_refusal(package, make_torch_hip(folder / "lacking", runtime), missing)
    make_runtime(folder / "no-stream" / runtime, symbols)
    check_refusal(package, make_torch_hip(folder / "no-stream", runtime, stream_call=False), STREAM_CALL)
    check_refusal(package, None, TORCH_HIP)
