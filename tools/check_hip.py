"""Checks the HIP backend on a machine that has neither ROCm nor an AMD GPU (`make hip`).

diffnl's HIP library is compiled twice, with HIP 7.1 and clang-22 for every architecture that torch has, and
with HIP 5.2 and clang-19 for one of each family (tools/hip_toolchain.py). Then, for both:

1. the registers, LDS and scratch of every kernel on every architecture go to build/hip/resources.md; scratch
   is an error, and so are waves of another width than csrc/gpu.h says and code objects that are too new;
2. the library links (tools/hip_library.py) against the torch of this environment and a stub of torch's HIP
   library with one symbol undefined, torch's call for the current stream, which only a CUDA or ROCm torch
   has; it needs no libamdhip64 by name, and calls nothing that HIP 5.2's runtime lacks;
3. it loads where there is no GPU, beside a working CPU backend. The one of HIP 7.1 has stand-ins for torch's
   HIP library and for the libamdhip64 of ROCm 6 and 7: all kernels are registered, and without a symbol or
   library the CPU works and the reason is told. The one of HIP 5.2 has that release's own runtime, which
   reports no device. The one of HIP 7.1 is the one that `make wheel` takes.
"""

import argparse
import dataclasses
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hip_library import check_runtime_has, link, load_with_debian_runtime, load_with_standins
from hip_toolchain import (
    HIP_5,
    HIP_7,
    OUT,
    ROOT,
    CheckFailed,
    Toolchain,
    compile_cxx,
    run,
    setup_module,
)

# -------------------------------------------------------------------------------------------- resources

ABI_OF_VERSION_5 = 3  # in the head of the file
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


def read_resources(toolchain: Toolchain, code: dict) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: {field: number}}} of code objects as {source: {architecture: path}}."""
    table = {}
    for source, objects in code.items():
        names = {}
        for arch, path in objects.items():
            notes = run(toolchain.tool("llvm-readelf"), "--file-header", "--notes", path)
            kernels = parse_notes(notes)
            check_abi(notes, path)
            if not kernels or (names and set(kernels) != set(names)):
                raise CheckFailed(f"{path} holds {sorted(kernels)}; expected {sorted(names) or 'kernels'}")
            if not names:
                lines = run("c++filt", *kernels).splitlines()
                names = {mangled: short_name(line) for mangled, line in zip(kernels, lines, strict=True)}
            for mangled, numbers in kernels.items():
                rows = table.setdefault(names[mangled], {})
                if arch in rows:
                    raise CheckFailed(f"two kernels read {names[mangled]} once shortened, one in {source}")
                rows[arch] = numbers
    return table


def check_abi(notes: str, path: Path) -> None:
    """Code objects of version 6 are for ROCm 6.3 and later."""
    version = re.search(r"ABI Version: +(\d+)", notes)
    if version is None or int(version[1]) != ABI_OF_VERSION_5:
        raise CheckFailed(f"{path} is no code object of version 5: some of ROCm 6 would not load it")


def check_waves(table: dict) -> None:
    """The compiler makes waves of the width that wave_width() in csrc/gpu.h says."""
    for name, rows in table.items():
        for arch, r in rows.items():
            width = 64 if re.fullmatch(r"gfx9..", arch) else 32
            if r["wave"] != width:
                raise CheckFailed(f"{name} has waves of {r['wave']} on {arch}; csrc/gpu.h takes {width}")


def summary(table: dict) -> str:
    """Markdown: a row an architecture."""
    lines = [
        "| architecture | wave | kernels | most VGPRs | most SGPRs | most LDS | scratch | spilled VGPRs |"
    ]
    lines.append("|---" * 8 + "|")
    for arch in next(iter(table.values())):
        rows = [of[arch] for of in table.values()]
        most = [max(r[field] for r in rows) for field in ("vgprs", "sgprs", "lds", "scratch", "vgpr_spills")]
        lines.append(f"| {arch} | {rows[0]['wave']} | {len(rows)} | {' | '.join(map(str, most))} |")
    return "\n".join(lines)


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
        "a VGPR):"
    )
    return "\n".join([legend, "", *rows, ""])


def check_scratch(table: dict) -> None:
    guilty = [
        f"  {name} on {arch}: {r['scratch']} bytes{', and a stack of unknown size' if r['dynamic'] else ''}"
        for name, rows in table.items()
        for arch, r in rows.items()
        if r["scratch"] or r["dynamic"]
    ]
    if guilty:
        raise CheckFailed(
            "Kernels must not use scratch (memory that stands in for registers):\n"
            + "\n".join(guilty)
            + "\nIndex local arrays by constants (unroll the loops over them), hold fewer values at a time, "
            "or loosen __launch_bounds__; functions that a kernel calls must be inlined."
        )


def all_kernels() -> Path:
    """A source that includes all kernels, as nvcc's does: most of a compilation is HIP's own headers."""
    source = OUT / "kernels.hip"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(f'#include "{name}"\n' for name in setup_module().KERNELS))
    return source


def check(toolchain: Toolchain, cxx: list[Path], archs: list[str], pool: ThreadPoolExecutor) -> str:
    """All there is to see with one compiler; returns its table of resources.

    `cxx` are the C++ objects, and `archs` the architectures that they were told of."""
    toolchain.prepare()
    kernels, code = toolchain.compile([all_kernels()], pool)
    table = read_resources(toolchain, code)
    print(f"{toolchain}\n\n{summary(table)}\n")
    check_scratch(table)
    check_waves(table)
    library = toolchain.folder / "diffnl" / setup_module().READY_HIP.name
    symbols = link([*cxx, *kernels], library)
    check_runtime_has(symbols, next(Path("/usr/lib").glob("*/libamdhip64.so.5")))
    if toolchain.hip == 5:
        load_with_debian_runtime(library, archs)
    else:
        load_with_standins(library, archs, symbols, len(table))
    size = library.stat().st_size / 1e6
    print(f"{library} ({size:.1f} MB): links, loads without a GPU; {len(table)} kernels\n", flush=True)
    return f"## {toolchain}\n\n{summary(table)}\n\n{resource_table(table)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default=",".join(HIP_7.archs), help="for HIP 7, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    archs = options.archs.split(",")
    newest = dataclasses.replace(HIP_7, archs=tuple(archs))
    sources = [Path("csrc", name) for name in setup_module().SOURCES["hip"]]
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            cxx = compile_cxx([source for source in sources if source.suffix == ".cpp"], archs, pool)
            tables = [check(toolchain, cxx, archs, pool) for toolchain in (newest, HIP_5)]
            (OUT / "resources.md").write_text("\n".join(tables))
    except CheckFailed as failure:
        print(f"tools/check_hip.py: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
