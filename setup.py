"""Builds diffnl's extension for the torch that is installed.

The backend follows the torch in this environment, never the GPU that happens to be present: a ROCm torch
means `hip`, a CUDA torch with a CUDA toolkit means `cuda`, anything else `cpu`. Environment variables:

    DIFFNL_BACKEND   cpu | cuda | hip   use this backend or fail
    DIFFNL_SANITIZE  1                  AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`)
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, ROCM_HOME, BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"diffnl builds against the torch of this environment, and importing it failed: {error}\n"
        "Install torch >= 2.10 first, then: pip install --no-build-isolation ."
    )

# Backends whose sources are in csrc/.
SOURCES = {"cpu": ["ops.cpp", "cell_list.cpp", "tile.cpp", "neighbors_cpu.cpp", "pair_vectors_cpu.cpp"]}
BACKENDS = ("cpu", "cuda", "hip")
TOOLKITS = {
    "cuda": ("a CUDA build of torch and the CUDA toolkit (nvcc; CUDA_HOME names its folder)", "nvcc"),
    "hip": ("a ROCm build of torch and the ROCm toolkit (hipcc; ROCM_HOME names its folder)", "hipcc"),
}


def has_toolkit(backend: str) -> bool:
    """Whether torch was built for `backend` and its compiler can be found."""
    if backend == "cpu":
        return True
    version, home = {
        "cuda": (torch.version.cuda, CUDA_HOME),
        "hip": (torch.version.hip, ROCM_HOME),
    }[backend]
    return version is not None and home is not None


def choose_backend() -> str:
    """The backend to build: DIFFNL_BACKEND if set, otherwise what torch was built for."""
    wanted = os.environ.get("DIFFNL_BACKEND", "")
    if wanted and wanted not in BACKENDS:
        sys.exit(f"DIFFNL_BACKEND must be one of {', '.join(BACKENDS)}; got {wanted!r}.")
    if wanted and not has_toolkit(wanted):
        sys.exit(
            f"DIFFNL_BACKEND={wanted} needs {TOOLKITS[wanted][0]}. Here torch is {torch.__version__} and "
            f"{TOOLKITS[wanted][1]} is {'found' if shutil.which(TOOLKITS[wanted][1]) else 'not found'}."
        )
    if wanted and wanted not in SOURCES:
        sys.exit(f"DIFFNL_BACKEND={wanted}: this version of diffnl has no {wanted} kernels yet; use cpu.")
    if wanted:
        return wanted
    best = "hip" if has_toolkit("hip") else "cuda" if has_toolkit("cuda") else "cpu"
    return best if best in SOURCES else "cpu"


def check_compiler() -> None:
    """Stops with advice when there is no C++ compiler, before a page of build output says it."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"diffnl needs a C++20 compiler, and {compiler!r} is not on the PATH. Install g++ >= 11 "
            "(Debian, Ubuntu: apt-get install g++), or name another in CXX."
        )


def extension(backend: str) -> CppExtension:
    """The shared library diffnl/_C.abi3.so for `backend`."""
    sanitize = os.environ.get("DIFFNL_SANITIZE", "0") == "1"
    compile_args = [
        "-std=c++20",
        "-O1" if sanitize else "-O3",
        "-g" if sanitize else "-g0",
        "-Wall",
        "-fvisibility=hidden",
        # The contract's arithmetic, to the bit: no fused multiply-add, no other rounding.
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wno-psabi",  # vectors of four doubles stay inside one file
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_STABLE_ONLY",
        f'-DDIFFNL_BACKENDS="{backend}"',
        f'-DDIFFNL_TORCH="{torch.__version__}"',
        '-DDIFFNL_ARCHS=""',
    ]
    link_args = []
    if sanitize:
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        compile_args += [*flags, "-DDIFFNL_SANITIZE"]
        link_args += flags
    elif platform.system() == "Linux":
        link_args += ["-s"]
    return CppExtension(
        "diffnl._C",
        [f"csrc/{name}" for name in SOURCES[backend]],
        depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        py_limited_api=True,
    )


check_compiler()
setup(
    ext_modules=[extension(choose_backend())],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
