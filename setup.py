"""Builds diffnl's libraries: diffnl/_C.abi3.so with all schemas and the CPU backend, and beside it one for a
GPU backend, diffnl/_cuda.abi3.so or diffnl/_hip.abi3.so, with kernels alone. diffnl/_load.py loads them.

The GPU backend follows the torch in this environment, never the GPU that happens to be present: a ROCm torch
means `hip`, a CUDA torch with a CUDA toolkit means `cuda`, anything else none. Environment variables:

    DIFFNL_BACKEND        cpu | cuda | hip   this backend or fail; "cuda,hip" for a wheel with both
    TORCH_CUDA_ARCH_LIST  "8.0;9.0+PTX"      NVIDIA architectures (default: CUDA_ARCHS that nvcc knows)
    PYTORCH_ROCM_ARCH     "gfx90a;gfx1100"   AMD architectures (default: those that torch was built for)
    CUDA_HOME, ROCM_HOME  /opt/rocm          the toolkit's folder, which holds bin/nvcc or bin/hipcc
    DIFFNL_SANITIZE       1                  AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`)

For the tests alone (`make hostgpu`) there is a fourth backend: DIFFNL_BACKEND=hostgpu compiles the GPU
kernels as C++ against tests/hostgpu and runs them on the CPU, with waves of DIFFNL_WAVE (32 or 64) threads.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        ROCM_HOME,
        BuildExtension,
        CppExtension,
        include_paths,
    )
except ImportError as error:
    sys.exit(
        f"diffnl builds against the torch of this environment, and importing it failed: {error}\n"
        "Install torch >= 2.10 first, then: pip install --no-build-isolation ."
    )

BACKENDS = ("cpu", "cuda", "hip", "hostgpu")  # the last for tests: it is offered to nobody
KERNELS = [
    "candidates_gpu.hip",
    "cell_list_gpu.hip",
    "count_pairs_gpu.hip",
    "neighbors.hip",
    "pair_vectors_gpu.hip",
    "scan_gpu.hip",
    "sorted_rows_gpu.hip",
]
CPU = [
    "ops.cpp",
    "ops_cpu.cpp",
    "candidates_cpu.cpp",
    "cell_list.cpp",
    "tile.cpp",
    "neighbors_cpu.cpp",
    "pair_vectors_cpu.cpp",
]
GPU = ["neighbors_gpu.cpp", "skin_gpu.cpp", "ops_gpu.cpp"]
SOURCES = {
    "cpu": CPU,
    "cuda": [*GPU, "neighbors_nvcc.cu"],  # the .cu includes the kernels
    "hip": [*GPU, *KERNELS],
    # For the tests: the kernels take the CPU backend's place.
    "hostgpu": ["ops.cpp", *GPU, *KERNELS],
}
LIBRARIES = {"cpu": "_C", "cuda": "_cuda", "hip": "_hip", "hostgpu": "_C"}
# The HIP library that `make hip` has built, for a wheel made where there is no ROCm.
READY_HIP = Path("build/hip/hip-7/diffnl/_hip.abi3.so")
TOOLKITS = {
    "cuda": ("the CUDA toolkit (nvcc; CUDA_HOME names its folder)", "nvcc"),
    "hip": (
        "a ROCm build of torch and the ROCm toolkit (ROCM_HOME names its folder, which holds bin/hipcc: "
        "/opt/rocm, or what `rocm-sdk path --root` prints where pip installed ROCm), or, for a wheel, the "
        "library that `make hip` builds without them",
        "hipcc",
    ),
}
# What a GPU build of torch lacks where its toolkit is not found.
MISSING = {
    "cuda": "nvcc is missing: install the CUDA toolkit, or set CUDA_HOME to its folder, which holds bin/nvcc",
    "hip": "hipcc is missing: install the ROCm toolkit, or set ROCM_HOME to its folder, which holds "
    "bin/hipcc (/opt/rocm, or what `rocm-sdk path --root` prints where pip installed ROCm)",
}
# The variables by which torch finds a toolkit, the first that is set.
HOMES = {"cuda": ("CUDA_HOME", "CUDA_PATH"), "hip": ("ROCM_HOME", "ROCM_PATH")}
# What data centres and desks hold today; the last of these that nvcc knows is added as PTX for cards to come.
CUDA_ARCHS = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
# What torch's wheels for ROCm 7.14 are built for. Those for earlier releases have gfx900 and gfx906 too: a
# source build against such a torch asks it (rocm_archs).
ROCM_ARCHS = [
    *("gfx908", "gfx90a", "gfx942", "gfx950"),
    *("gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201"),
]
# HIP's runtime comes through torch's HIP library, which brings the one that torch runs on: a libamdhip64
# named here could be another. The library is needed though it may define none of the symbols itself.
HIP_LINK = ["-Wl,--no-as-needed", "-ltorch_hip"]

# The contract's arithmetic, to the bit: no fused multiply-add, no other rounding.
EXACT = "-ffp-contract=off"
TORCH_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]


def has_compiler(home: str | None, backend: str) -> bool:
    """Whether a toolkit's folder has the compiler where torch calls it."""
    return bool(home) and Path(home, "bin", TOOLKITS[backend][1]).exists()


def named_home(backend: str) -> str | None:
    """The toolkit's folder that the environment names. One without a compiler is an error: another toolkit
    must not be taken in its place, nor be missed only after half a build."""
    for variable in HOMES[backend]:
        home = os.environ.get(variable)
        if home:
            if not has_compiler(home, backend):
                compiler = TOOLKITS[backend][1]
                toolkit = {"cuda": "CUDA", "hip": "ROCm"}[backend]
                sys.exit(
                    f"{variable} must name the folder of the {toolkit} toolkit, which holds bin/{compiler}; "
                    f"got {home!r}, and there is no {Path(home, 'bin', compiler)}."
                )
            return home
    return None


def cuda_home() -> str | None:
    """The folder of the CUDA toolkit, which torch itself looks for only if it is a CUDA build."""
    home = named_home("cuda") or CUDA_HOME
    if has_compiler(home, "cuda"):
        return home
    nvcc = shutil.which("nvcc")
    beside_nvcc = str(Path(nvcc).resolve().parents[1]) if nvcc else ""
    # An nvcc on the PATH may be a script that calls another. Beside the real one there is nvvm.
    folders = [home for home in (beside_nvcc, "/usr/local/cuda") if has_compiler(home, "cuda")]
    return next((home for home in folders if Path(home, "nvvm").exists()), None)


def rocm_home() -> str | None:
    """The folder of the ROCm toolkit, which torch looks for only if it is a ROCm build."""
    home = named_home("hip") or ROCM_HOME
    return home if has_compiler(home, "hip") else None


def has_toolkit(backend: str) -> bool:
    """Whether `backend` can be compiled here. The CUDA library takes of a CUDA torch only headers, which
    all builds of torch share; torch runs HIP's compiler only if it is a ROCm build."""
    if backend == "cuda":
        return torch.version.hip is None and cuda_home() is not None
    return backend != "hip" or (torch.version.hip is not None and rocm_home() is not None)


def choose_backends() -> list[str]:
    """The backends to build, a library each: DIFFNL_BACKEND's if set, otherwise what torch was built for."""
    variable = os.environ.get("DIFFNL_BACKEND", "")
    wanted = [name for name in re.split(r"[;,\s]+", variable.lower()) if name]
    unknown = [name for name in wanted if name not in BACKENDS]
    if unknown or ("hostgpu" in wanted and len(wanted) > 1):
        sys.exit(
            f"DIFFNL_BACKEND must be cpu, cuda or hip, or cuda,hip for a wheel with both; got {variable!r}."
        )
    if wanted == ["hostgpu"]:
        return wanted
    for backend in wanted:
        if not has_toolkit(backend) and not is_ready(backend):
            needs, compiler = TOOLKITS[backend]
            if backend == "hip" and torch.version.hip is not None:
                sys.exit(f"DIFFNL_BACKEND=hip cannot be built: {MISSING['hip']}.")
            sys.exit(
                f"DIFFNL_BACKEND={backend} needs {needs}. Here torch is {torch.__version__} and "
                f"{compiler} is {'found' if shutil.which(compiler) else 'not found'}."
            )
    if wanted:
        return ["cpu", *(backend for backend in ("cuda", "hip") if backend in wanted)]
    for backend, version in (("hip", torch.version.hip), ("cuda", torch.version.cuda)):
        if version is not None and has_toolkit(backend):
            return ["cpu", backend]
        if version is not None:
            print(
                f"diffnl: building the CPU backend only, though torch {torch.__version__} is for GPUs. "
                f"{MISSING[backend]}, and build again. `python -m diffnl` shows which backends work.",
                file=sys.stderr,
            )
    return ["cpu"]


def is_ready(backend: str) -> bool:
    """Whether the library is taken as it is, because nothing here could compile it."""
    return backend == "hip" and not has_toolkit("hip") and READY_HIP.exists()


def files_of(backend: str) -> list[Path]:
    """The files of csrc that a backend's library is built from: sources, what they include, and the schemas,
    of which it holds a fingerprint."""
    found, rest = {}, ["ops.cpp", *SOURCES[backend]]
    while rest:
        path = Path("csrc", rest.pop())
        if path not in found and path.exists():
            found[path] = re.findall(r'^#include "(\w+\.\w+)"', path.read_text(), re.M)
            rest += found[path]
    return sorted(found)


def check_ready() -> None:
    """Stops where the HIP library that is there is none, or was built from other sources than these."""
    data = READY_HIP.read_bytes()
    if not data.startswith(b"\x7fELF") or b"diffnl part;hip;" not in data:
        sys.exit(f"{READY_HIP} must be diffnl's HIP library, and is something else: run `make hip` again.")
    built = READY_HIP.stat().st_mtime
    newer = [str(path) for path in files_of("hip") if path.stat().st_mtime > built]
    if newer:
        sys.exit(
            f"{READY_HIP} must be built from the sources that are here, and is older than "
            f"{', '.join(newer)}: run `make hip` again."
        )


def check_compiler() -> None:
    """Stops with advice when there is no C++ compiler, before a page of build output says it."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"diffnl needs a C++20 compiler, and {compiler!r} is not on the PATH. Install g++ >= 11 "
            "(Debian, Ubuntu: apt-get install g++), or name another in CXX."
        )


def nvcc_archs() -> list[str]:
    """Those of CUDA_ARCHS that the nvcc at hand can compile for, the last one as PTX too."""
    nvcc = str(Path(cuda_home(), "bin", "nvcc"))
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    archs = [arch for arch in CUDA_ARCHS if f"sm_{arch.replace('.', '')}" in known]
    if not archs:
        sys.exit(f"{nvcc} knows none of {', '.join(CUDA_ARCHS)}; name architectures in TORCH_CUDA_ARCH_LIST.")
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def rocm_archs() -> list[str]:
    """The architectures that the torch at hand was built for, or ROCM_ARCHS where it does not say."""
    archs = torch.cuda.get_arch_list() if torch.version.hip else []
    if torch.version.hip and not archs:  # up to torch 2.12 the list is empty on a machine without a GPU
        told = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
        archs = (told or "").split()
    return list(dict.fromkeys(arch.split(":")[0] for arch in archs)) or ROCM_ARCHS


def compression() -> list[str]:
    """Machine code takes a fifth of the room with the slower of nvcc's compressions, which came with 12.8."""
    told = subprocess.check_output([str(Path(cuda_home(), "bin", "nvcc")), "--version"], text=True)
    release = re.search(r"release (\d+)\.(\d+)", told)
    new = release is not None and (int(release[1]), int(release[2])) >= (12, 8)
    return ["--compress-mode=size"] if new else []


def architectures(backend: str) -> list[str]:
    """The GPU architectures to compile for."""
    if backend not in ("cuda", "hip"):
        return []
    variable = {"cuda": "TORCH_CUDA_ARCH_LIST", "hip": "PYTORCH_ROCM_ARCH"}[backend]
    archs = re.split(r"[;,\s]+", os.environ.get(variable, "").strip(" ;,"))
    if archs == [""]:
        archs = nvcc_archs() if backend == "cuda" else rocm_archs()
    # torch makes compiler flags of the variable; without one it would look for a GPU.
    os.environ[variable] = ";".join(archs)
    return archs


def path_maps() -> list[str]:
    """Flags of g++, clang and hipcc by which __FILE__ is csrc/... and torch/include/..., wherever the
    checkout and torch are. The last one that fits counts: torch may lie inside the checkout."""
    folders = {f"{Path.cwd()}/": "", f"{Path(torch.__file__).parent}/include/": "torch/include/"}
    return [f"-fmacro-prefix-map={folder}={name}" for folder, name in folders.items()]


def cxx_flags(backend: str, archs: list[str]) -> list[str]:
    """Flags of the C++ compiler."""
    flags = [
        "-std=c++20",
        "-O3",
        "-falign-loops=64",  # short loops do the search: where they begin in a cache line is worth 15 %
        "-g0",
        "-Wall",
        "-fvisibility=hidden",
        EXACT,
        "-fno-math-errno",
        "-Wno-psabi",  # vectors of four doubles stay inside one file
        *path_maps(),
        *TORCH_ABI,
        # What csrc/part.h tells of the library. Parts that differ in the schemas do not go together.
        f'-DDIFFNL_BACKEND="{backend}"',
        f'-DDIFFNL_TORCH="{torch.__version__}"',
        f'-DDIFFNL_ARCHS="{",".join(archs)}"',
        f'-DDIFFNL_SCHEMAS="{zlib.crc32(Path("csrc/ops.cpp").read_bytes()):08x}"',
    ]
    if backend in ("cuda", "hip"):
        # torch's header declares the call for the current stream under USE_CUDA, ROCm's included.
        flags += ["-DUSE_CUDA"]
    if backend == "hostgpu":
        wave = os.environ.get("DIFFNL_WAVE", "32")
        if wave not in ("32", "64"):
            sys.exit(f"DIFFNL_WAVE must be 32 or 64; got {wave!r}.")
        # An installed HIP lies in the compiler's own folders, which come after these. Ninja runs elsewhere.
        flags += [f"-I{Path('tests/hostgpu').resolve()}", f"-I{Path('csrc').resolve()}"]
        flags += ["-DDIFFNL_HOSTGPU", f"-DDIFFNL_WAVE={wave}"]
    return flags


def device_flags(backend: str) -> list[str]:
    """Flags of nvcc or hipcc; torch adds the architectures."""
    if backend == "cuda":
        host = ["-Wall", "-fvisibility=hidden", EXACT, *path_maps()]
        # No -lineinfo: it puts the paths of all sources beside the machine code, and no flag maps them. For a
        # profiler set NVCC_APPEND_FLAGS=-lineinfo.
        return [
            "-std=c++20",
            "-O3",
            "-fmad=false",
            "--expt-relaxed-constexpr",
            "--threads=0",  # architectures in parallel
            *(f"--compiler-options={flag}" for flag in host),
        ]
    if backend == "hip":
        # torch has ninja follow no headers of a .hip. The fingerprint changes the command when one changes.
        headers = b"".join(header.read_bytes() for header in sorted(Path("csrc").glob("*.h")))
        return [
            "-std=c++20",
            "-O3",
            "-Wall",
            "-fvisibility=hidden",
            EXACT,
            *path_maps(),
            "-mcode-object-version=5",  # all of ROCm 6 and 7 load it; 6 is for 6.3 on
            f"-DDIFFNL_HEADERS={zlib.crc32(headers)}",
        ]
    return []


def as_cpp(kernel: str) -> str:
    """A C++ file that includes `kernel`: compilers take a .hip for something to link."""
    wrapper = Path("build", "hostgpu", f"{kernel}.cpp")
    text = f'#include "{kernel}"\n'
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    if not wrapper.exists() or wrapper.read_text() != text:
        # In one step: builds for both wave widths may run at a time.
        new = wrapper.with_suffix(f".{os.getpid()}")
        new.write_text(text)
        new.replace(wrapper)
    return str(wrapper)


def static_cudart() -> list[str]:
    """Flags for the linker. With CUDA's runtime inside, the library loads under a torch of any CUDA version:
    it needs the driver alone. The runtime's names stay inside, or torch's would answer to them."""
    home = Path(cuda_home())
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    folder = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if folder is None:
        sys.exit(f"diffnl links CUDA's static runtime, and there is no libcudart_static.a in {folders[0]}.")
    inside = ["-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a"]
    return [f"-L{folder}", *inside, "-ldl", "-lrt", "-lpthread"]


def extension(backend: str) -> Extension:
    """The shared library for `backend`."""
    name = f"diffnl.{LIBRARIES[backend]}"
    if is_ready(backend):
        check_ready()
        return Extension(name, [str(READY_HIP)], py_limited_api=True)
    sources = [f"csrc/{name}" for name in SOURCES[backend]]
    depends = [str(path) for path in sorted(Path("csrc").iterdir())]
    compile_args = {"cxx": cxx_flags(backend, architectures(backend)), "nvcc": device_flags(backend)}
    if backend == "cuda":
        compile_args["nvcc"] += compression()
    link_args, toolkit = [], {}
    if os.environ.get("DIFFNL_SANITIZE", "0") == "1":
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        compile_args["cxx"] += [*flags, "-fno-omit-frame-pointer", "-O1", "-g", "-DDIFFNL_SANITIZE"]
        link_args += flags
    elif platform.system() == "Linux" and backend != "hostgpu":
        link_args += ["-s"]
    if backend == "cuda":
        # Not CUDAExtension, which would tie the library to torch_cuda, c10_cuda and a shared runtime. torch's
        # call for the current stream is found through libtorch, which in a CUDA torch needs libtorch_cuda:
        # the library must keep it, though it uses no symbol of libtorch itself.
        link_args += [*static_cudart(), "-Wl,--no-as-needed", "-ltorch"]
    if backend == "hip":
        # CUDAExtension would run hipify and leave its output in csrc/. These sources are HIP as they are.
        toolkit = {"include_dirs": include_paths("cuda")}
        link_args += HIP_LINK
    if backend == "hostgpu":
        sources = [as_cpp(Path(name).name) if name.endswith(".hip") else name for name in sources]
        sources.append("tests/hostgpu/hip/hip_runtime.cpp")  # reads its library's symbols: not stripped
    return CppExtension(
        name,
        sources,
        depends=depends,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
        **toolkit,
    )


class Build(BuildExtension):
    """torch's, for libraries of which one may be ready."""

    def build_extensions(self) -> None:
        extensions = self.extensions
        # An earlier build may have left a library that is not wanted now, and a wheel would take it along.
        kept = {Path(self.get_ext_fullpath(it.name)).name for it in extensions}
        for library in Path(self.build_lib, "diffnl").glob("_*.so"):
            if library.name not in kept:
                library.unlink()
        self.extensions = [it for it in extensions if it.sources != [str(READY_HIP)]]
        cpp_extension.CUDA_HOME = cuda_home()
        super().build_extensions()
        for ready in extensions:
            if ready not in self.extensions:
                target = Path(self.get_ext_fullpath(ready.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(READY_HIP, target)
        self.extensions = extensions


if __name__ == "__main__":
    check_compiler()
    setup(
        ext_modules=[extension(backend) for backend in choose_backends()],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
