"""The raw operators: torch's own checks of them, their fake kernels, the library file and what it needs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_adjoint, assert_equal_bits, assert_same_bits
from systems import SYSTEMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import diffnl

OPS = torch.ops.diffnl
NAMES = [
    "triclinic",
    "batch_interleaved",
    "batch_mixed_pbc",
    "batch_open_zero_cells",
    "one_free_atom",
    "nothing",
]
LINKED = NAMES[:4]  # those with pairs
PACKAGE = Path(diffnl.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_*.so"))


def search_arguments(name, dtype=torch.float64, device="cpu", full=True, sorted=False):
    """What diffnl.neighbor_pairs hands to the raw search."""
    system = SYSTEMS[name]
    positions, cell, _, system_idx = system.arguments(dtype, device)
    cell = positions.new_zeros(1, 3, 3) if cell is None else cell.reshape(-1, 3, 3)
    pbc = system.flags().to(device)
    return positions, cell, pbc, system_idx, 4.0, full, sorted


def list_arguments(name, dtype=torch.float64, device="cpu"):
    """(positions, cell, system_idx) and the list (mapping, shifts, vectors)."""
    arguments = search_arguments(name, dtype, device)
    return arguments[0], arguments[1], arguments[3], OPS.neighbor_pairs(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_the_search(name, dtype, device):
    for full in (True, False):
        for in_order in (True, False):
            torch.library.opcheck(OPS.neighbor_pairs, search_arguments(name, dtype, device, full, in_order))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_the_vectors(name, dtype, device):
    positions, cell, system_idx, (mapping, shifts, _) = list_arguments(name, dtype, device)
    torch.library.opcheck(OPS.pair_vectors, (positions, cell, mapping, shifts, system_idx))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_adjoint(need, name, dtype, device):
    positions, cell, system_idx, (mapping, shifts, vectors) = list_arguments(name, dtype, device)
    sizes = len(positions), len(cell)
    torch.library.opcheck(OPS.pair_vectors_adjoint, (vectors, mapping, shifts, system_idx, *sizes, *need))


@pytest.mark.parametrize("name", ["batch_interleaved", "batch_trailing_empty", "one_atom_tiny", "nothing"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "half"])
def test_adjoint_follows_its_formula(full, name, dtype, device):
    positions, cell, pbc, system_idx, *options = search_arguments(name, dtype, device, full)
    mapping, shifts, vectors = OPS.neighbor_pairs(positions, cell, pbc, system_idx, *options)
    g = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(80), dtype=dtype).to(device)
    sizes = len(positions), len(cell)
    gradients = OPS.pair_vectors_adjoint(g, mapping, shifts, system_idx, *sizes, True, True)
    assert_adjoint(gradients, g, mapping, shifts, system_idx, *sizes)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
def test_a_gradient_that_is_not_needed_has_no_rows(need, dtype, device):
    positions, cell, system_idx, (mapping, shifts, g) = list_arguments("batch_interleaved", dtype, device)
    arguments = g, mapping, shifts, system_idx, len(positions), len(cell)
    wanted, both = OPS.pair_vectors_adjoint(*arguments, *need), OPS.pair_vectors_adjoint(*arguments)
    assert [len(g) for g in wanted] == [len(full) if n else 0 for full, n in zip(both, need, strict=True)]
    assert_equal_bits([g for g in wanted if len(g)], [full for full, n in zip(both, need, strict=True) if n])


def linked(name, dtype, device, in_order):
    """Arguments of the linked search, and its results."""
    positions, cell, pbc, system_idx, cutoff, _, _ = search_arguments(name, dtype, device)
    arguments = positions, cell, pbc, system_idx, cutoff, in_order
    return arguments, OPS.linked_neighbor_pairs(*arguments)


@pytest.fixture
def linked_operators(gpu_kernels):
    if not gpu_kernels:
        pytest.skip("links are of the GPU kernels")


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("in_order", [False, True], ids=["unordered", "sorted"])
def test_a_linked_list_is_the_list(in_order, name, dtype, device, linked_operators):
    (positions, cell, pbc, system_idx, cutoff, _), (*pairs, links, rows) = linked(
        name, dtype, device, in_order
    )
    assert_same_bits(pairs, OPS.neighbor_pairs(positions, cell, pbc, system_idx, cutoff, True, in_order))
    vectors = OPS.linked_vectors(positions, cell, links, rows, system_idx)
    assert_equal_bits([vectors], pairs[2:])
    g = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(81), dtype=dtype).to(device)
    sizes = len(positions), len(cell)
    for need in ((True, True), (True, False), (False, True)):
        gradients = OPS.linked_adjoint(g, links, rows, None, *sizes, *need)
        gradients = [gradient if n else None for gradient, n in zip(gradients, need, strict=True)]
        assert_adjoint(gradients, g, *pairs[:2], system_idx, *sizes)


@pytest.mark.parametrize("name", ["one_free_atom", "nothing", "one_atom_tiny_chain"])
def test_a_list_that_cannot_be_linked_comes_without_links(name, dtype, device, linked_operators):
    """No pairs, or shifts beyond 31: a chain of cells of 0.7 with a cutoff of 40."""
    positions, cell, pbc, system_idx, *_ = search_arguments(name, dtype, device)
    *pairs, links, rows = OPS.linked_neighbor_pairs(positions, cell, pbc, system_idx, 40.0, False)
    assert links.shape == rows.shape == (0,) and links.dtype == rows.dtype == torch.int64
    assert_same_bits(pairs, OPS.neighbor_pairs(positions, cell, pbc, system_idx, 40.0, True, False))


@pytest.mark.parametrize("name", LINKED)
def test_opcheck_of_the_linked_operators(name, dtype, device, linked_operators):
    arguments, (*_, vectors, links, rows) = linked(name, dtype, device, False)
    positions, cell, _, system_idx, *_ = arguments
    torch.library.opcheck(OPS.linked_neighbor_pairs, arguments)
    torch.library.opcheck(OPS.linked_vectors, (positions, cell, links, rows, system_idx))
    torch.library.opcheck(
        OPS.linked_adjoint, (vectors, links, rows, None, len(positions), len(cell), True, True)
    )


def test_fake_kernels_give_the_shapes_of_the_real_ones():
    arguments = search_arguments("batch_interleaved")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        positions, cell, _, system_idx = fake[:4]
        mapping, shifts, vectors = OPS.neighbor_pairs(*fake)
        count = mapping.shape[1]
        assert isinstance(count, torch.SymInt), "the number of pairs is not known before the search"
        assert mapping.shape[0] == 2 and mapping.dtype == torch.int64
        assert shifts.shape == (count, 3) and shifts.dtype == torch.int32
        assert vectors.shape == (count, 3) and vectors.dtype == positions.dtype
        again = OPS.pair_vectors(positions, cell, mapping, shifts, system_idx)
        assert again.shape == (count, 3) and again.dtype == positions.dtype
        grads = OPS.pair_vectors_adjoint(vectors, mapping, shifts, system_idx, len(positions), 4, True, True)
        assert [g.shape for g in grads] == [positions.shape, cell.shape]


def test_the_layer_runs_on_fake_tensors(device):
    with FakeTensorMode(shape_env=ShapeEnv()):
        positions, cell = (torch.empty(n, 3, device=device, requires_grad=True) for n in (9, 3))
        # Real tensors with this cutoff would hold more pairs than any memory.
        pairs = diffnl.NeighborList(1e9)(positions, cell, True)
        forces, stress = diffnl.forces_and_stress(pairs.vectors.sum(), positions, cell)
    assert forces.shape == (9, 3) and stress.shape == (3, 3)


@pytest.mark.parametrize("broken", ["positions", "cell", "pbc", "system_idx", "mapping", "shifts"])
def test_a_direct_call_with_a_wrong_tensor_fails_instead_of_reading_elsewhere(broken, device):
    positions, cell, system_idx, (mapping, shifts, _) = list_arguments("batch_interleaved", device=device)
    pbc = torch.ones(4, 3, dtype=torch.bool, device=device)
    values = dict(
        positions=positions, cell=cell, pbc=pbc, system_idx=system_idx, mapping=mapping, shifts=shifts
    )
    values[broken] = values[broken][:-1]
    with pytest.raises(RuntimeError, match="diffnl"):
        if broken in ("mapping", "shifts"):
            OPS.pair_vectors(positions, cell, values["mapping"], values["shifts"], system_idx)
        else:
            OPS.neighbor_pairs(
                *(values[k] for k in ("positions", "cell", "pbc", "system_idx")), 4.0, True, False
            )
            OPS.pair_vectors(values["positions"], values["cell"], mapping, shifts, values["system_idx"])


def test_build_info():
    info = diffnl.build_info()
    assert set(info) == {"backends", "torch", "archs", "parts"}
    assert info["backends"] in (["cpu"], ["cpu", "cuda"], ["cpu", "hip"], ["hostgpu"])
    assert re.match(r"\d+\.\d+", info["torch"])
    assert isinstance(info["archs"], list)
    assert bool(info["archs"]) == bool({"cuda", "hip"} & set(info["backends"]))
    assert [part["backend"] for part in info["parts"] if part["loaded"]] == info["backends"]
    assert all((part["reason"] is None) == part["loaded"] for part in info["parts"])


def test_version_is_the_installed_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", diffnl.__version__)


def run_without_library(folder, create=None):
    """Imports a copy of the package whose library is absent, or is the bytes `create`."""
    copy = folder / "diffnl"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if create is not None:
        (copy / "_C.abi3.so").write_bytes(create)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import diffnl"
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120, cwd=folder
    )


def test_import_without_the_library_says_what_to_run(tmp_path):
    result = run_without_library(tmp_path)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "library is missing" in last
    assert str(tmp_path) in last and "pip install" in last


def test_import_of_a_library_that_does_not_load_says_what_to_run(tmp_path):
    result = run_without_library(tmp_path, create=b"not a library")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "does not load under torch" in last and "pip install" in last
    assert "too short" in last or "invalid ELF header" in last, "the loader's own words are missing"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_library_needs_no_cpp_symbol_of_torch():
    """Only torch's C shims may be undefined: then one binary serves every torch from 2.10 on."""
    assert LIBRARIES
    for library in LIBRARIES:
        result = subprocess.run(
            ["nm", "-DC", "--undefined-only", str(library)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        needed = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()]
        assert any(name.startswith("aoti_torch_") or name.startswith("torch_") for name in needed)
        assert [name for name in needed if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", name)] == []


def test_the_library_is_not_tied_to_one_python():
    names = {library.name for library in LIBRARIES}
    assert {"_C.abi3.so"} <= names <= {"_C.abi3.so", "_cuda.abi3.so", "_hip.abi3.so"}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf of binutils")
def test_gpu_libraries_are_tied_to_no_release_of_a_runtime():
    """They find torch's stream call through its libraries, and a runtime inside or through these too."""
    libraries = [library for library in LIBRARIES if library.name != "_C.abi3.so"]
    if not libraries:
        pytest.skip("no GPU library is here")
    for library in libraries:
        result = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True)
        needed = set(re.findall(r"NEEDED.*\[(.+)\]", result.stdout))
        assert {"libtorch.so", "libtorch_hip.so"} & needed
        assert [
            name for name in needed if re.match(r"lib(cudart|cuda|torch_cuda|c10_cuda|amdhip64)\b", name)
        ] == []
