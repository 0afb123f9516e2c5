"""torch's hipify over csrc/, as a project's CUDAExtension would run it: diffnl's own build never does."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest

hipify_python = pytest.importorskip("torch.utils.hipify.hipify_python")
CSRC = Path(__file__).parents[1] / "csrc"


def hipify(folder: Path) -> tuple[dict[Path, Path], list[str]]:
    """{source: the file to compile instead} of a copy in `folder`, and the names of files written over."""
    csrc = folder.resolve() / "csrc"
    originals = {path: path.read_bytes() for path in csrc.iterdir()}
    sources = [path for path in originals if path.suffix in (".cpp", ".hip", ".cu")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = hipify_python.hipify(
            project_directory=str(csrc.parent),
            output_directory=str(csrc.parent),
            header_include_dirs=[],
            includes=[str(csrc.parent / "*")],
            extra_files=[str(path) for path in sources],
            show_detailed=True,
            is_pytorch_extension=True,
            hipify_extra_files_only=True,
        )
    changed = [path.name for path, content in originals.items() if path.read_bytes() != content]
    return {source: Path(result[str(source)].hipified_path or source) for source in sources}, changed


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CSRC, tmp_path / "csrc")
    return tmp_path


def test_sources_are_left_as_they_are_and_find_their_headers(copy):
    rewritten, changed = hipify(copy)
    assert changed == []
    assert {path.name for path in rewritten} >= {"neighbors.hip", "neighbors_gpu.cpp", "neighbors_nvcc.cu"}
    for path in rewritten.values():
        for header in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert header.startswith("hip/") or (path.parent / header).exists(), (path.name, header)


def test_a_source_of_the_same_name_would_be_written_over(copy):
    """Why no .cu is named like a .hip."""
    (copy / "csrc" / "neighbors.cu").write_text("__global__ void f() {}\n")
    assert hipify(copy)[1] == ["neighbors.hip"]
