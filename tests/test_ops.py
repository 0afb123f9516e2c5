"""The raw operators: torch's own checks of them, their fake kernels, the library file and what it needs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
PACKAGE = Path(diffnl.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_C*.so"))


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


def test_adjoint_follows_its_formula(dtype, device):
    positions, cell, system_idx, (mapping, shifts, vectors) = list_arguments(
        "batch_interleaved", dtype, device
    )
    g = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(80), dtype=dtype).to(device)
    grad_positions, grad_cell = OPS.pair_vectors_adjoint(
        g, mapping, shifts, system_idx, len(positions), len(cell), True, True
    )
    i, j = mapping
    expected = torch.zeros_like(positions).index_add(0, j, g).index_add(0, i, -g)
    close = {torch.float32: dict(rtol=1e-5, atol=1e-4), torch.float64: {}}[dtype]
    torch.testing.assert_close(grad_positions, expected, **close)
    outer = shifts.to(dtype)[:, :, None] * g[:, None, :]
    torch.testing.assert_close(grad_cell, torch.zeros_like(cell).index_add(0, system_idx[i], outer), **close)


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


def test_the_layer_runs_on_fake_tensors():
    with FakeTensorMode(shape_env=ShapeEnv()):
        positions, cell = torch.empty(9, 3, requires_grad=True), torch.empty(3, 3, requires_grad=True)
        # Real tensors with this cutoff would hold more pairs than any memory.
        pairs = diffnl.NeighborList(1e9)(positions, cell, True)
        forces, stress = diffnl.forces_and_stress(pairs.vectors.sum(), positions, cell)
    assert forces.shape == (9, 3) and stress.shape == (3, 3)


@pytest.mark.parametrize("broken", ["positions", "cell", "pbc", "system_idx", "mapping", "shifts"])
def test_a_direct_call_with_a_wrong_tensor_fails_instead_of_reading_elsewhere(broken):
    positions, cell, system_idx, (mapping, shifts, _) = list_arguments("batch_interleaved")
    pbc = torch.ones(4, 3, dtype=torch.bool)
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
    assert set(info) == {"backends", "torch", "archs"}
    assert "cpu" in info["backends"] and set(info["backends"]) <= {"cpu", "cuda", "hip"}
    assert re.match(r"\d+\.\d+", info["torch"])
    assert isinstance(info["archs"], list) and bool(info["archs"]) == (info["backends"] != ["cpu"])


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
    assert [library.name for library in LIBRARIES] == ["_C.abi3.so"]
