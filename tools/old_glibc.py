"""Stand-ins for the C libraries of older systems, to link against (`make wheel`).

glibc 2.34 moved libpthread, libdl and librt into libc, under new versions of their symbols. What is linked on
newer systems asks for glibc 2.34 therefore, though it uses nothing new: mostly libcudart_static.a. A stand-in
has the name of one of the three, and the version of each symbol that older systems have and newer ones too.

    python tools/old_glibc.py FOLDER    makes them there, and prints the flags for the linker
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

OLDEST = (2, 28)
LIBRARIES = {  # by how the symbols start
    "libpthread.so.0": ("pthread_", "sem_"),
    "libdl.so.2": ("dl",),
    "librt.so.1": ("shm_", "timer_", "mq_"),
}


def versions_of(symbols: str) -> dict[str, list[tuple[int, ...]]]:
    """{symbol: the versions there are}, ascending, of what `readelf --dyn-syms` prints."""
    found = defaultdict(set)
    for name, version in re.findall(r"\b(\w+)@+GLIBC_([\d.]+)\b", symbols):
        found[name].add(tuple(map(int, version.split("."))))
    return {name: sorted(versions) for name, versions in found.items()}


def older(versions: dict[str, list[tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """{symbol: its last version of OLDEST or before}, of those that have a later one too."""
    return {
        name: [version for version in all_versions if version <= OLDEST][-1]
        for name, all_versions in versions.items()
        if all_versions[0] <= OLDEST < all_versions[-1]
    }


def make(folder: Path, soname: str, symbols: dict[str, tuple[int, ...]]) -> Path:
    """A library that defines symbols with these versions and can do nothing."""
    nodes = defaultdict(list)
    for name, version in symbols.items():
        nodes["GLIBC_" + ".".join(map(str, version))].append(name)
    script = folder / f"{soname}.map"
    script.write_text("".join(f"{node} {{ {'; '.join(names)}; }};\n" for node, names in nodes.items()))
    source = folder / f"{soname}.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in symbols))
    library = folder / soname
    flags = [
        "-shared",
        "-fPIC",
        "-fno-builtin",
        "-nostdlib",
        f"-Wl,-soname,{soname},--version-script={script}",
    ]
    subprocess.run(["gcc", *flags, source, "-o", library], check=True)
    return library


def main(folder: Path) -> str:
    """The flags that put the stand-ins before libc."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = subprocess.check_output(["gcc", "-print-file-name=libc.so.6"], text=True).strip()
    symbols = subprocess.check_output(["readelf", "--dyn-syms", "--wide", libc], text=True)
    moved = older(versions_of(symbols))
    libraries = []
    for soname, starts in LIBRARIES.items():
        its = {name: version for name, version in moved.items() if name.startswith(starts)}
        if its:
            libraries.append(str(make(folder, soname, its).resolve()))
    return ",".join(["-Wl,--push-state,--no-as-needed", *libraries, "--pop-state"]) if libraries else ""


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
