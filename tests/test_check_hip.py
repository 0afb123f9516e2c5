"""tools/check_hip.py and its parts: what they make of a compiler's output, and what they refuse.

The check itself is `make hip`.
"""

import importlib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tools():
    """The modules of tools/ by name."""
    pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def check_hip(tools):
    return tools("check_hip")


@pytest.fixture(scope="module")
def hip_library(tools):
    return tools("hip_library")


@pytest.fixture(scope="module")
def hip_toolchain(tools):
    return tools("hip_toolchain")


# What `llvm-readelf --notes` prints of a code object, shortened.
KERNEL = """  - .agpr_count:     0
    .args:
      - .offset:         0
        .name:           atoms
        .size:           48
    .group_segment_fixed_size: 2048
    .name:           {name}
    .private_segment_fixed_size: {scratch}
    .sgpr_count:     20
    .sgpr_spill_count: 3
    .symbol:         {name}.kd
    .uses_dynamic_stack: {dynamic}
    .vgpr_count:     38
    .vgpr_spill_count: 1
    .wavefront_size: 64
"""
NOTES = "    AMDGPU Metadata:\n---\namdhsa.kernels:\n{}amdhsa.target:   amdgcn-amd-amdhsa--gfx90a\n...\n"


def notes(*kernels):
    return NOTES.format("".join(KERNEL.format(name=n, scratch=s, dynamic=d) for n, s, d in kernels))


def test_kernels_are_read_from_a_code_object(check_hip):
    kernels = check_hip.parse_notes(notes(("_Z5countv", 0, "false"), ("_Z4fillv", 16, "true")))
    common = {"vgprs": 38, "sgprs": 20, "lds": 2048, "vgpr_spills": 1, "sgpr_spills": 3, "wave": 64}
    assert kernels == {
        "_Z5countv": {**common, "scratch": 0, "dynamic": 0},
        "_Z4fillv": {**common, "scratch": 16, "dynamic": 1},
    }


@pytest.mark.parametrize(("scratch", "dynamic"), [(16, "false"), (0, "true")])
def test_scratch_fails_on_every_architecture(check_hip, scratch, dynamic):
    clean = check_hip.parse_notes(notes(("count", 0, "false")))["count"]
    spilled = check_hip.parse_notes(notes(("count", scratch, dynamic)))["count"]
    check_hip.check_scratch({"count": {"gfx90a": clean, "gfx1100": clean}})
    for arch, other in [("gfx90a", "gfx1100"), ("gfx1100", "gfx90a")]:
        with pytest.raises(check_hip.CheckFailed, match=f"count on {arch}"):
            check_hip.check_scratch({"count": {arch: spilled, other: clean}})


def test_waves_are_those_that_the_kernels_count_on(check_hip):
    row = check_hip.parse_notes(notes(("count", 0, "false")))["count"]
    check_hip.check_waves({"count": {"gfx908": row, "gfx950": row, "gfx1100": {**row, "wave": 32}}})
    for arch, wave in [("gfx942", 32), ("gfx1030", 64), ("gfx1201", 64)]:
        with pytest.raises(check_hip.CheckFailed, match=f"waves of {wave} on {arch}"):
            check_hip.check_waves({"count": {arch: {**row, "wave": wave}}})


def test_code_objects_that_are_too_new_are_noticed(check_hip):
    head = "  OS/ABI:                            AMDGPU - HSA\n  ABI Version:                       {}\n"
    check_hip.check_abi(head.format(3), Path("scan.gfx90a.co"))
    with pytest.raises(check_hip.CheckFailed, match=r"scan\.gfx90a\.co is no code object of version 5"):
        check_hip.check_abi(head.format(4), Path("scan.gfx90a.co"))


def test_resource_table_has_a_row_a_kernel_and_a_column_an_architecture(check_hip):
    row = check_hip.parse_notes(notes(("count", 0, "false")))["count"]
    table = check_hip.resource_table({"count": {"gfx90a": row, "gfx1100": {**row, "wave": 32, "vgprs": 7}}})
    header, rule, line = [text for text in table.splitlines() if text.startswith("|")]
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (header, line)]
    assert cells[0] == ["kernel", "gfx90a, wave 64", "gfx1100, wave 32"]
    assert cells[1] == ["`count`", "38 / 20 / 2048 / 0 / 1, 3", "7 / 20 / 2048 / 0 / 1, 3"]
    assert set(rule) == set("|- ")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void diffnl::(anonymous namespace)::fill<float, (diffnl::Mode)1>(diffnl::P<float>)", None),
        ("diffnl::links(long const*, long)", "links"),
    ],
)
def test_kernel_names_are_short(check_hip, demangled, short):
    assert check_hip.short_name(demangled) == (short or "fill<float, (Mode)1>")


def test_summary_has_a_row_an_architecture(check_hip):
    row = check_hip.parse_notes(notes(("count", 0, "false")))["count"]
    table = {
        "count": {"gfx90a": row, "gfx1100": {**row, "wave": 32}},
        "fill": {"gfx90a": row, "gfx1100": row},
    }
    table["fill"]["gfx90a"] = {**row, "vgprs": 99}
    rows = [line.strip("| ").split(" | ") for line in check_hip.summary(table).splitlines()[2:]]
    assert rows == [
        ["gfx90a", "64", "2", "99", "20", "2048", "0", "1"],
        ["gfx1100", "32", "2", "38", "20", "2048", "0", "1"],
    ]


def test_numbers_of_architectures(hip_toolchain):
    # The constants of the device libraries that Debian has for these.
    numbers = {"gfx90a": 9010, "gfx942": 9402, "gfx1030": 10300, "gfx1100": 11000, "gfx1201": 12001}
    assert {arch: hip_toolchain.isa_version(arch) for arch in numbers} == numbers


@pytest.mark.parametrize(("hip", "clang"), [(5, 19), (7, 22)])
def test_missing_tools_are_named_with_what_to_install(hip_toolchain, monkeypatch, hip, clang):
    monkeypatch.setattr(hip_toolchain.shutil, "which", lambda name: None)
    with pytest.raises(hip_toolchain.CheckFailed, match=rf"clang\+\+-{clang}.*apt-get install clang-{clang}"):
        {5: hip_toolchain.HIP_5, 7: hip_toolchain.HIP_7}[hip].prepare()


def test_headers_come_out_of_the_package_that_has_them(hip_toolchain, monkeypatch, tmp_path):
    """Once: where they are, nothing is fetched. The package itself is not kept."""
    rocm, fetched = tmp_path / "rocm", []

    def download(*command, **_):
        assert "pip" in command and hip_toolchain.TRITON in command
        fetched.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "triton.whl", "w") as wheel:
            version = (
                "#define HIP_VERSION_MAJOR 7\n#define HIP_VERSION_MINOR 1\n#define HIP_VERSION_PATCH 25\n"
            )
            wheel.writestr(hip_toolchain.TRITON_HEADERS + "hip/hip_version.h", version)
            wheel.writestr("triton/compiler.py", "")

    monkeypatch.setattr(hip_toolchain, "run", download)
    for _ in range(2):
        hip_toolchain.fetch_headers(rocm)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"rocm/include/hip/hip_version.h", "rocm/share/hip/version"} and len(fetched) == 1
    assert (rocm / "share/hip/version").read_text().splitlines()[0] == "HIP_VERSION_MAJOR=7"


def test_headers_of_another_release_are_noticed(hip_toolchain, monkeypatch):
    found = "#define HIP_VERSION_MINOR 2\n#define HIP_VERSION_MAJOR 5\n"
    monkeypatch.setattr(hip_toolchain, "run", lambda *command: found)
    hip_toolchain.HIP_5.check_headers()
    with pytest.raises(hip_toolchain.CheckFailed, match="the headers are those of HIP 5, not 7"):
        hip_toolchain.HIP_7.check_headers()


NEEDS = """ 0x0000000000000001 (NEEDED)             Shared library: [libc10.so]
 0x0000000000000001 (NEEDED)             Shared library: [{}]
Version needs section '.gnu.version_r' contains 1 entry:
  0x0010:   Name: {}  Flags: none  Version: 4
"""


@pytest.mark.parametrize(
    ("library", "version", "fits"),
    [
        ("libtorch_hip.so", "GLIBC_2.14", True),
        ("libtorch_hip.so", "hip_4.2", False),
        ("libamdhip64.so.7", "GLIBC_2.14", False),
        ("libtorch.so", "GLIBC_2.14", False),
    ],
)
def test_a_library_tied_to_one_rocm_is_noticed(hip_library, library, version, fits):
    report = NEEDS.format(library, version)
    if fits:
        hip_library.check_needs(report, Path("_C.abi3.so"))
        return
    with pytest.raises(hip_library.CheckFailed, match="must need libtorch_hip.so, no libamdhip64"):
        hip_library.check_needs(report, Path("_C.abi3.so"))


def test_a_function_that_an_old_runtime_lacks_is_noticed(hip_library, monkeypatch):
    monkeypatch.setattr(hip_library, "run", lambda *_: "0259b00 T hipGetDevice@@hip_4.2\n")
    hip_library.check_runtime_has(["hipGetDevice"], Path("libamdhip64.so.5"))
    with pytest.raises(hip_library.CheckFailed, match="libamdhip64.so.5 lacks hipGetDevicePropertiesR0600"):
        hip_library.check_runtime_has(
            ["hipGetDevice", "hipGetDevicePropertiesR0600"], Path("libamdhip64.so.5")
        )
