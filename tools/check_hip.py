"""Checks the HIP backend on a machine that has neither ROCm nor an AMD GPU (`make hip`).

Debian's clang-19, HIP headers and device libraries compile the whole HIP flavour of the extension, with the
flags that setup.py and torch give hipcc and g++ on a ROCm torch. Then:

1. the library links against the torch of this environment and libamdhip64 with one symbol undefined, torch's
   call for the current stream, which only a CUDA or ROCm torch has;
2. it loads where there is no GPU: the CPU backend works, the GPU one is registered, HIP reports no device,
   and without the stream call the import fails with advice;
3. the registers, LDS and scratch of every kernel on every architecture go to build/hip/resources.md, and
   scratch on gfx90a is an error;
4. torch's hipify, run over a copy of csrc/ as CUDAExtension runs it, leaves sources that compile.

The library is a check, not something to ship: it wants Debian's libamdhip64.so.5.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("build/hip")
PACKAGE = OUT / "diffnl"
LIBRARY = PACKAGE / "_C.abi3.so"
ARCHS = ["gfx90a", "gfx942", "gfx1100", "gfx1102", "gfx1201"]
WITHOUT_SCRATCH = {"gfx90a"}
STREAM_CALL = "aoti_torch_get_current_cuda_stream"
PACKAGES = "clang-19 clang-tools-19 lld-19 llvm-19 libamdhip64-dev rocm-device-libs g++ libc-bin"
TOOLS = ["clang++-19", "clang-offload-bundler-19", "ld.lld-19", "llvm-readelf-19", "llvm-cxxfilt-19"]


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


# ------------------------------------------------------------------------------------ the toolchain


def check_tools() -> None:
    missing = [tool for tool in [*TOOLS, "g++", "ldd"] if shutil.which(tool) is None]
    if not Path("/usr/include/hip/hip_runtime.h").exists():
        missing.append("hip/hip_runtime.h")
    if not list(Path("/usr/lib").glob("*/amdgcn/bitcode/ocml.bc")):
        missing.append("amdgcn/bitcode/ocml.bc")
    if missing:
        raise CheckFailed(f"not found: {', '.join(missing)}. Debian 12: apt-get install {PACKAGES}")


def isa_version(arch: str) -> int:
    """The number of gfx90a is 9010: thousands major, hundreds minor, and a hexadecimal step."""
    digits = arch.removeprefix("gfx")
    return 1000 * int(digits[:-2]) + 100 * int(digits[-2], 16) + int(digits[-1], 16)


def device_libraries(archs: list[str]) -> Path:
    """A folder of links to Debian's device libraries, with the files for newer architectures added.

    What is missing for an architecture is one constant, its number.
    """
    folder = OUT / "bitcode"
    folder.mkdir(parents=True, exist_ok=True)
    for library in next(Path("/usr/lib").glob("*/amdgcn/bitcode")).glob("*.bc"):
        link = folder / library.name
        if not link.exists():
            link.symlink_to(library)
    for arch in archs:
        bitcode = folder / f"oclc_isa_version_{arch.removeprefix('gfx')}.bc"
        if not bitcode.exists():
            name = "const __constant int __oclc_ISA_version"
            source = bitcode.with_suffix(".cl")
            source.write_text(f"extern {name};\n{name} = {isa_version(arch)};\n")
            target = ["-x", "cl", "-target", "amdgcn-amd-amdhsa", "-nogpulib", "-O2", "-emit-llvm"]
            run("clang++-19", *target, "-c", source, "-o", bitcode)
    return folder


class Compiler:
    """Makes the objects of the HIP flavour, as torch's BuildExtension would under ROCm.

    Except that architectures are compiled one by one, in parallel, and bundled after that; the compiler's
    driver does the same in one command.
    """

    def __init__(self, archs: list[str]):
        from torch.utils import cpp_extension

        spec = importlib.util.spec_from_file_location("diffnl_setup", "setup.py")
        setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
        self.archs = archs
        self.sources = [Path("csrc", name) for name in setup.SOURCES["hip"]]
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        hip = cpp_extension.COMMON_HIP_FLAGS
        self.cxx_flags = ["-fPIC", *includes, *hip, *setup.cxx_flags("hip", archs)]
        # No torch headers here: they need parts of ROCm that Debian lacks, and the kernels include none.
        self.hip_flags = [
            *("-x", "hip", "--rocm-path=/usr", f"--rocm-device-lib-path={device_libraries(archs)}"),
            *("-fno-gpu-rdc", *hip, *cpp_extension.COMMON_HIPCC_FLAGS, *setup.device_flags("hip")),
        ]

    def cxx(self, source: Path, output: Path) -> None:
        run("g++", *self.cxx_flags, "-c", source, "-o", output)

    def hip(self, source: Path, output: Path, *flags) -> None:
        # The halves of a source carry the same name of their own, else they clash with other sources'.
        name = ["-Xclang", f"-cuid={source.stem}"]
        run("clang++-19", *self.hip_flags, *name, *flags, "-c", source, "-o", output)

    def device(self, source: Path, arch: str, output: Path) -> None:
        """The code object for one architecture."""
        flags = ["--cuda-device-only", "--no-gpu-bundle-output", f"--offload-arch={arch}"]
        self.hip(source, output, *flags)

    def host(self, source: Path, code: dict[str, Path], output: Path) -> None:
        """The host object, with a bundle of the code objects `code` (by architecture) inside."""
        bundle = output.with_suffix(".hipfb")
        targets = ["host-x86_64-unknown-linux", *(f"hipv4-amdgcn-amd-amdhsa--{arch}" for arch in code)]
        inputs = [f"-input={path}" for path in ["/dev/null", *code.values()]]
        how = ["-type=o", "-bundle-align=4096", f"-targets={','.join(targets)}"]
        run("clang-offload-bundler-19", *how, *inputs, f"-output={bundle}")
        self.hip(source, output, "--cuda-host-only", "-Xclang", "-fcuda-include-gpubinary", "-Xclang", bundle)


# ------------------------------------------------------------------------- 1. compiled and linked


def compile_all(compiler: Compiler, pool: ThreadPoolExecutor) -> tuple[list[Path], dict]:
    """All objects, and the code objects as {source: {architecture: path}}."""
    objects = OUT / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    kernels = [source for source in compiler.sources if source.suffix == ".hip"]
    code = {k: {arch: objects / f"{k.stem}.{arch}.co" for arch in compiler.archs} for k in kernels}
    jobs = [pool.submit(compiler.device, k, arch, code[k][arch]) for k in kernels for arch in compiler.archs]
    outputs = {source: objects / f"{source.name}.o" for source in compiler.sources}
    jobs += [pool.submit(compiler.cxx, s, outputs[s]) for s in compiler.sources if s not in kernels]
    wait_for(jobs, pool)
    wait_for([pool.submit(compiler.host, k, code[k], outputs[k]) for k in kernels], pool)
    return list(outputs.values()), code


def link(objects: list[Path]) -> None:
    from torch.utils.cpp_extension import library_paths

    PACKAGE.mkdir(parents=True, exist_ok=True)
    folders = [f"-L{path}" for path in library_paths()]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-lamdhip64"]
    run("g++", "-shared", "-s", *objects, *folders, *libraries, "-o", LIBRARY)
    for module in Path("diffnl").glob("*.py"):
        shutil.copy(module, PACKAGE)

    # The loader resolves every symbol against what the library names as its dependencies.
    search = {**os.environ, "LD_LIBRARY_PATH": ":".join(library_paths())}
    result = subprocess.run(["ldd", "-r", LIBRARY], capture_output=True, text=True, env=search)
    report = result.stdout + result.stderr
    if result.returncode or "not found" in report:
        raise CheckFailed(f"ldd -r {LIBRARY}:\n{report}")
    undefined = set(re.findall(r"undefined symbol: (\S+)", report))
    if undefined != {STREAM_CALL}:
        raise CheckFailed(
            f"{LIBRARY} must leave exactly {STREAM_CALL} undefined, and leaves: "
            f"{', '.join(sorted(undefined)) or 'nothing'}. Anything else is missing from the sources, from "
            "libamdhip64 or from torch's stable ABI; without this call kernels miss torch's current stream."
        )


# ------------------------------------------------------------------------------ 2. loaded without a GPU

STREAM_STUB = f"""
#include <cstdlib>
extern "C" __attribute__((visibility("default"))) int {STREAM_CALL}(int, void**) {{ std::abort(); }}
"""

USE = """
import ctypes
import torch
import diffnl

assert {folder!r} in diffnl.__file__, diffnl.__file__
assert diffnl.build_info()["backends"] == ["cpu", "hip"], diffnl.build_info()
assert diffnl.build_info()["archs"] == {archs!r}, diffnl.build_info()
operators = {{name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffnl::")}}
assert len(operators) > 3, operators
of_the_cpu = {{"compact_candidates", "merge_candidates", "candidates_margins", "select_candidates"}}
of_the_cpu |= {{"neighbor_lists"}}
for name in operators - {{"diffnl::build_info"}}:
    key = "CPU" if name.removeprefix("diffnl::") in of_the_cpu else "CUDA"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)

count = ctypes.c_int(-1)
error = ctypes.CDLL("libamdhip64.so.5").hipGetDeviceCount(ctypes.byref(count))
assert error == 100, f"hipGetDeviceCount returned {{error}}, not hipErrorNoDevice (100)"

positions = torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4.0
cell, pbc = 4.0 * torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.bool)
mapping, shifts, vectors = torch.ops.diffnl.neighbor_pairs(positions, cell, pbc, None, 3.0, True, True)
oracle = diffnl.reference.neighbor_pairs(positions, cell[0], True, 3.0)
assert mapping.shape[1] > 20 and torch.equal(mapping, oracle.mapping) and torch.equal(shifts, oracle.shifts)
assert torch.equal(vectors, oracle.vectors)
"""


def load(archs: list[str]) -> None:
    stub = OUT / "stream_stub.so"
    source = stub.with_suffix(".cpp")
    source.write_text(STREAM_STUB)
    run("g++", "-shared", "-fPIC", source, "-o", stub)
    # No AMD GPU either where there happens to be one.
    hidden = {**os.environ, "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}
    script = OUT / "use.py"  # beside the package, so that it imports this one
    script.write_text(USE.format(folder=str(OUT), archs=archs))
    run(sys.executable, script, env={**hidden, "LD_PRELOAD": str(stub.resolve())})
    bare = [sys.executable, "-c", "import diffnl"]
    bare = subprocess.run(bare, capture_output=True, text=True, env=hidden, cwd=OUT)
    last = (bare.stderr.strip().splitlines() or [""])[-1]
    if bare.returncode != 1 or not last.startswith("ImportError: ") or STREAM_CALL not in bare.stderr:
        raise CheckFailed(
            f"Under a torch without {STREAM_CALL} the import must end in diffnl's ImportError, and ended "
            f"with exit status {bare.returncode}:\n{bare.stderr}"
        )


# ----------------------------------------------------------------------------------------- 3. resources

FIELDS = {
    "vgprs": "vgpr_count",
    "sgprs": "sgpr_count",
    "lds": "group_segment_fixed_size",
    "scratch": "private_segment_fixed_size",
    "vgpr_spills": "vgpr_spill_count",
    "sgpr_spills": "sgpr_spill_count",
    "wave": "wavefront_size",
}


def parse_notes(notes: str) -> dict[str, dict[str, int]]:
    """{mangled kernel: {field: number}} from the metadata that `llvm-readelf --notes` prints as YAML.

    Kernels are the items of a list indented by two, their arguments those of one indented further.
    """
    kernels = {}
    section = notes.partition("amdhsa.kernels:")[2]
    section = re.split(r"^amdhsa\.|^\.\.\.", section, maxsplit=1, flags=re.M)[0]
    for item in re.split(r"^  - ", section, flags=re.M)[1:]:
        own = dict(re.findall(r"^(?:    )?\.(\w+): +(.*?) *$", item, flags=re.M))
        numbers = {field: int(own[key]) for field, key in FIELDS.items()}
        # Recursion and calls through pointers: the size of the stack is not known, and it is scratch.
        numbers["dynamic"] = int(own.get("uses_dynamic_stack") == "true")
        kernels[own["name"].strip("'\"")] = numbers
    return kernels


def short_name(demangled: str) -> str:
    """`void diffnl::(anonymous namespace)::fill<float>(Params)` -> `fill<float>`."""
    name = demangled.replace("(anonymous namespace)::", "").replace("diffnl::", "").removeprefix("void ")
    depth = 0
    for k, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:k]
    return name


def read_resources(code: dict) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: {field: number}}}."""
    table = {}
    for source, objects in code.items():
        names = {}
        for arch, path in objects.items():
            kernels = parse_notes(run("llvm-readelf-19", "--notes", path))
            if not kernels or (names and set(kernels) != set(names)):
                raise CheckFailed(f"{path} holds {sorted(kernels)}; expected {sorted(names) or 'kernels'}")
            if not names:
                lines = run("llvm-cxxfilt-19", *kernels).splitlines()
                names = {mangled: short_name(line) for mangled, line in zip(kernels, lines, strict=True)}
            for mangled, numbers in kernels.items():
                rows = table.setdefault(names[mangled], {})
                if arch in rows:
                    raise CheckFailed(f"two kernels read {names[mangled]} once shortened, one in {source}")
                rows[arch] = numbers
    return table


def resource_table(table: dict) -> str:
    """Markdown: a row a kernel, a column an architecture."""
    archs = list(next(iter(table.values())))
    waves = {arch: "/".join(sorted({str(rows[arch]["wave"]) for rows in table.values()})) for arch in archs}

    def cell(r):
        scratch = f"{r['scratch']}{'+' if r['dynamic'] else ''}"
        return (
            f"{r['vgprs']} / {r['sgprs']} / {r['lds']} / {scratch} / {r['vgpr_spills']}, {r['sgpr_spills']}"
        )

    lines = [["kernel", *(f"{arch}, wave {waves[arch]}" for arch in archs)]]
    lines += [[f"`{name}`", *(cell(rows[arch]) for arch in archs)] for name, rows in sorted(table.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    legend = (
        "VGPRs / SGPRs / bytes of LDS / bytes of scratch / spilled VGPRs, spilled SGPRs (those into lanes of "
        "a VGPR), from clang-19:"
    )
    return "\n".join([legend, "", *rows, ""])


def check_scratch(table: dict) -> None:
    guilty = [
        f"  {name} on {arch}: {r['scratch']} bytes{', and a stack of unknown size' if r['dynamic'] else ''}"
        for name, rows in table.items()
        for arch, r in rows.items()
        if arch in WITHOUT_SCRATCH and (r["scratch"] or r["dynamic"])
    ]
    if guilty:
        raise CheckFailed(
            "Kernels must not use scratch (memory that stands in for registers):\n"
            + "\n".join(guilty)
            + "\nIndex local arrays by constants (unroll the loops over them), hold fewer values at a time, "
            "or loosen __launch_bounds__; functions that a kernel calls must be inlined."
        )


# -------------------------------------------------------------------------------------------- 4. hipify


def hipify(folder: Path, sources: list[Path]) -> dict[Path, Path]:
    """Runs torch's hipify over `folder` as CUDAExtension does: {source: the file to compile instead}."""
    from torch.utils.hipify import hipify_python

    folder = folder.resolve()
    originals = {path: path.read_bytes() for path in (folder / "csrc").iterdir()}
    # The .cu is not a source of the HIP flavour. Its output is made all the same, to see where it goes.
    given = [str(folder / source) for source in [*sources, *folder.glob("csrc/*.cu")]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = hipify_python.hipify(
            project_directory=str(folder),
            output_directory=str(folder),
            header_include_dirs=[],
            includes=[str(folder / "*")],
            extra_files=given,
            show_detailed=True,
            is_pytorch_extension=True,
            hipify_extra_files_only=True,
        )
    changed = [path.name for path, content in originals.items() if path.read_bytes() != content]
    if changed:
        raise CheckFailed(f"torch's hipify writes over {', '.join(changed)}: no .cu may be named like a .hip")
    return {source: Path(result[str(folder / source)].hipified_path or folder / source) for source in sources}


def check_hipify(compiler: Compiler, pool: ThreadPoolExecutor) -> None:
    folder = OUT / "hipify"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("csrc", folder / "csrc")
    output = folder / "objects"
    output.mkdir()
    rewritten = hipify(folder, compiler.sources)
    arch = compiler.archs[0]
    jobs = []
    for source, path in rewritten.items():
        if source.suffix == ".hip":
            jobs.append(pool.submit(compiler.device, path, arch, output / f"{path.name}.co"))
        elif path.name != source.name:  # the others are what has been compiled already
            jobs.append(pool.submit(compiler.cxx, path, output / f"{path.name}.o"))
    wait_for(jobs, pool)
    new = sorted(path.name for source, path in rewritten.items() if path.name != source.name)
    print(f"hipify: {len(jobs)} files compile; rewritten: {', '.join(new) or 'none'}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default=",".join(ARCHS), help="architectures, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    try:
        check_tools()
        compiler = Compiler(options.archs.split(","))
        with ThreadPoolExecutor(options.jobs) as pool:
            objects, code = compile_all(compiler, pool)
            table = read_resources(code)
            report = resource_table(table)
            (OUT / "resources.md").write_text(report)
            print(report)
            link(objects)
            load(compiler.archs)
            print(f"{LIBRARY}: links, loads without a GPU, lacks {STREAM_CALL} alone")
            check_hipify(compiler, pool)
        check_scratch(table)
    except CheckFailed as failure:
        print(f"tools/check_hip.py: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
