"""HIP compilers with headers and device libraries, on a machine that has no ROCm.

Two pairs of a compiler and headers make the objects of the kernels, with the flags that setup.py and torch
give hipcc on a ROCm torch: clang-19 with the HIP 5.2 that Debian 12 packages, and clang-22 with HIP 7.1,
whose headers come inside the triton package. The device libraries are Debian's for both. The C++ sources
include nothing of HIP: g++ compiles them once.
"""

import functools
import hashlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("build/hip")  # in the checkout, where all of this runs
TRITON = "triton==3.9.0"  # holds HIP 7.1 headers
TRITON_HEADERS = "triton/backends/amd/include/"


class CheckFailed(Exception):
    """What does not hold, and what to do about it."""


def run(*command, **options) -> str:
    """Standard output of a command that must succeed; what it warned about is passed on."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if result.returncode:
        words = shlex.join(str(part) for part in command)
        raise CheckFailed(f"exit status {result.returncode} of\n{words}\n{result.stdout}{result.stderr}")
    sys.stderr.write(result.stderr)
    return result.stdout


def wait_for(jobs: list, pool: ThreadPoolExecutor) -> None:
    """Until all are done, or one has failed; then the rest need not start."""
    try:
        for job in jobs:
            job.result()
    except CheckFailed:
        pool.shutdown(cancel_futures=True)
        raise


@functools.cache
def setup_module():
    """The checkout's setup.py."""
    spec = importlib.util.spec_from_file_location("diffnl_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def isa_version(arch: str) -> int:
    """The number of gfx90a is 9010: thousands major, hundreds minor, and a hexadecimal step."""
    digits = arch.removeprefix("gfx")
    return 1000 * int(digits[:-2]) + 100 * int(digits[-2], 16) + int(digits[-1], 16)


def fetch_headers(rocm: Path) -> None:
    """Makes `rocm` look like an installation of ROCm to a compiler: the headers, and their version in the
    file where it looks for that. The package around them is large and is not kept."""
    version = rocm / "share" / "hip" / "version"
    if version.exists():  # it is written last
        return
    rocm.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=rocm.parent) as folder:
        how = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        run(sys.executable, "-m", "pip", "download", *how, TRITON)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            headers = [name for name in archive.namelist() if name.startswith(TRITON_HEADERS)]
            for name in headers:
                if not name.endswith("/"):
                    path = rocm / "include" / name.removeprefix(TRITON_HEADERS)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(name))
    header = rocm / "include" / "hip" / "hip_version.h"
    if not header.exists():
        raise CheckFailed(f"{TRITON} has no {TRITON_HEADERS}hip/hip_version.h: name a release that has")
    numbers = re.findall(r"#define (HIP_VERSION_(?:MAJOR|MINOR|PATCH)) (\d+)", header.read_text())
    version.parent.mkdir(parents=True, exist_ok=True)
    version.write_text("".join(f"{name}={number}\n" for name, number in numbers))


@dataclass(frozen=True)
class Toolchain:
    """A compiler, the headers it compiles against, and the architectures to compile for.

    The objects are those of torch's BuildExtension under ROCm, except that architectures are compiled one by
    one, in parallel, and bundled after that; the compiler's driver does the same in one command.
    """

    clang: int  # its release
    hip: int  # HIP_VERSION_MAJOR of the headers
    rocm: Path  # its include/ holds the headers
    archs: tuple[str, ...]
    packages: str  # of Debian 12

    @property
    def folder(self) -> Path:
        return OUT / f"hip-{self.hip}"

    def tool(self, name: str) -> str:
        return f"{name}-{self.clang}"

    def __str__(self) -> str:
        return f"HIP {self.hip}, clang-{self.clang}"

    def prepare(self) -> None:
        """Makes what the compiler needs beside the sources, or says what to install."""
        tools = [self.tool(name) for name in ("clang++", "clang-offload-bundler", "ld.lld", "llvm-readelf")]
        missing = [name for name in [*tools, "gcc", "g++", "ldd", "nm"] if shutil.which(name) is None]
        if not list(Path("/usr/lib").glob("*/amdgcn/bitcode/ocml.bc")):
            missing.append("amdgcn/bitcode/ocml.bc")
        if self.rocm == Path("/usr") and not Path("/usr/include/hip/hip_runtime.h").exists():
            missing.append("hip/hip_runtime.h")
        if missing:
            raise CheckFailed(f"not found: {', '.join(missing)}. Debian 12: apt-get install {self.packages}")
        if self.rocm != Path("/usr"):
            fetch_headers(self.rocm)
        self.make_device_libraries()
        self.check_headers()

    def make_device_libraries(self) -> None:
        """A folder of links to Debian's device libraries, with the files for newer architectures added.

        What is missing for an architecture is one constant, its number, for code objects of any version.
        """
        folder = self.folder / "bitcode"
        folder.mkdir(parents=True, exist_ok=True)
        for library in next(Path("/usr/lib").glob("*/amdgcn/bitcode")).glob("*.bc"):
            link = folder / library.name
            if not link.exists():
                link.symlink_to(library)
        for arch in self.archs:
            bitcode = folder / f"oclc_isa_version_{arch.removeprefix('gfx')}.bc"
            if not bitcode.exists():
                name = "const __constant int __oclc_ISA_version"
                source = bitcode.with_suffix(".cl")
                source.write_text(f"extern {name};\n{name} = {isa_version(arch)};\n")
                target = ["-x", "cl", "-target", "amdgcn-amd-amdhsa", "-nogpulib", "-O2", "-emit-llvm"]
                any_version = ["-Xclang", "-mcode-object-version=none"]
                run(self.tool("clang++"), *target, *any_version, "-c", source, "-o", bitcode)

    def check_headers(self) -> None:
        """Both compilations take the headers of the release asked for. Others may lie where the compiler
        looks by itself, and would be taken in silence."""
        clang = [self.tool("clang++"), *self.hip_flags, f"--offload-arch={self.archs[0]}"]
        for half in ("--cuda-device-only", "--cuda-host-only"):
            command = [*clang, half, "-E", "-dM", "csrc/scan_gpu.hip"]
            found = re.search(r"^#define HIP_VERSION_MAJOR (\d+)", run(*command), re.M)
            if found is None or int(found[1]) != self.hip:
                raise CheckFailed(
                    f"the headers are those of HIP {found and found[1]}, not {self.hip}, for\n"
                    f"{shlex.join(command)}"
                )

    @property
    def own_headers(self) -> list[str]:
        """Before the folders that compilers search by themselves, where another HIP may lie."""
        return [] if self.rocm == Path("/usr") else ["-isystem", str(self.rocm / "include")]

    @property
    def hip_flags(self) -> list[str]:
        from torch.utils import cpp_extension

        # No torch headers here: they need parts of ROCm that Debian lacks, and the kernels include none.
        return [
            *("-x", "hip", f"--rocm-path={self.rocm}", f"--rocm-device-lib-path={self.folder / 'bitcode'}"),
            *("-fno-gpu-rdc", "-Icsrc", *self.own_headers, *cpp_extension.COMMON_HIP_FLAGS),
            *(*cpp_extension.COMMON_HIPCC_FLAGS, *setup_module().device_flags("hip")),
        ]

    def device(self, source: Path, arch: str, output: Path) -> None:
        """The code object for one architecture, unless it is there, made of the same by the same."""
        own = ["--cuda-device-only", "--no-gpu-bundle-output", f"--offload-arch={arch}"]
        command = [self.tool("clang++"), *self.hip_flags, *own, *name_of_its_own(source)]
        command += ["-c", str(source), "-o", str(output)]
        made_of = hashlib.sha256((run(command[0], "--version") + shlex.join(command)).encode())
        for path in [source, *sorted(Path("csrc").glob("*.h*"))]:
            made_of.update(path.read_bytes())
        stamp = output.with_name(output.name + ".made_of")
        if output.exists() and stamp.exists() and stamp.read_text() == made_of.hexdigest():
            return
        stamp.unlink(missing_ok=True)
        run(*command)
        stamp.write_text(made_of.hexdigest())

    def host(self, source: Path, code: dict[str, Path], output: Path) -> None:
        """The host object, with a bundle of the code objects `code` (by architecture) inside."""
        bundle = output.with_suffix(".hipfb")
        targets = ["host-x86_64-unknown-linux-gnu-", *(f"hipv4-amdgcn-amd-amdhsa--{arch}" for arch in code)]
        inputs = [f"-input={path}" for path in ["/dev/null", *code.values()]]
        how = ["-type=o", "-bundle-align=4096", f"-targets={','.join(targets)}"]
        run(self.tool("clang-offload-bundler"), *how, *inputs, f"-output={bundle}")
        own = ["--cuda-host-only", "-Xclang", "-fcuda-include-gpubinary", "-Xclang", bundle]
        own += name_of_its_own(source)
        run(self.tool("clang++"), *self.hip_flags, *own, "-c", source, "-o", output)

    def compile(self, kernels: list[Path], pool: ThreadPoolExecutor) -> tuple[list[Path], dict]:
        """The objects of `kernels`, and the code objects in them as {source: {architecture: path}}."""
        objects = self.folder / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        code = {k: {arch: objects / f"{k.stem}.{arch}.co" for arch in self.archs} for k in kernels}
        outputs = {source: objects / f"{source.name}.o" for source in kernels}
        pairs = [(kernel, arch) for kernel in kernels for arch in self.archs]
        wait_for([pool.submit(self.device, k, arch, code[k][arch]) for k, arch in pairs], pool)
        wait_for([pool.submit(self.host, k, code[k], outputs[k]) for k in kernels], pool)
        return list(outputs.values()), code


def name_of_its_own(source: Path) -> list[str]:
    """The halves of a source carry the same name, and no other source's: else their symbols clash."""
    return ["-Xclang", f"-cuid={source.stem}"]


def cxx_command(source: Path, archs: Sequence[str]) -> list:
    """g++ with the flags that setup.py and torch give it on a ROCm torch."""
    from torch.utils import cpp_extension

    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    own = setup_module().cxx_flags("hip", list(archs))
    return ["g++", "-fPIC", *includes, *cpp_extension.COMMON_HIP_FLAGS, *own, source]


def compile_cxx(sources: list[Path], archs: Sequence[str], pool: ThreadPoolExecutor) -> list[Path]:
    """The objects of the C++ sources of a library with code for `archs`."""
    folder = OUT / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {source: folder / f"{source.name}.o" for source in sources}
    jobs = [pool.submit(run, *cxx_command(s, archs), "-c", "-o", output) for s, output in outputs.items()]
    wait_for(jobs, pool)
    return list(outputs.values())


COMMON = "libamdhip64-dev rocm-device-libs g++ libc-bin binutils"
HIP_5 = Toolchain(
    clang=19,
    hip=5,
    rocm=Path("/usr"),
    archs=("gfx90a", "gfx942", "gfx1100", "gfx1201"),  # one of a family; gfx950 is younger than the compiler
    packages=f"clang-19 clang-tools-19 lld-19 llvm-19 {COMMON}",
)
HIP_7 = Toolchain(
    clang=22,
    hip=7,
    rocm=OUT / "rocm-7",
    archs=tuple(setup_module().ROCM_ARCHS),
    packages=f"clang-22 clang-tools-22 lld-22 llvm-22 {COMMON}",
)
