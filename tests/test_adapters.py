"""What holds of the adapters without the codes they are for; `make test-adapters` has those."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffnl

ROOT = Path(__file__).parents[1]
ADAPTERS = sorted((Path(diffnl.__file__).parent / "adapters").glob("[!_]*.py"))
# What the adapters are for, by the names they are imported under.
OTHERS = """ase chgnet fairchem mace matscipy metatensor metatomic nequip allegro numpy nvalchemiops pymatgen
    schnetpack sevenn torch_cluster torch_geometric torch_sim torchmdnet vesin warp""".split()

BLOCKED = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[name for name in OTHERS if name != "numpy"]}:
            raise ImportError(f"{{name}} was imported")

sys.meta_path.insert(0, Refuse())
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_there_are_adapters():
    assert len(ADAPTERS) > 10


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_an_adapter_is_small(path):
    assert len(path.read_text().splitlines()) < 170


def test_importing_diffnl_imports_none_of_the_packages():
    before = "import torch, sys; known = set(sys.modules); import diffnl"
    loaded = run(f"{before}\nprint(*(set(sys.modules) - known))")
    assert "diffnl" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(OTHERS)
    assert not [name for name in loaded if name.startswith("diffnl.ad")]


# Each adapter in a process of its own, which is a fork of one that has imported torch already.
IMPORT_EACH = f"""
import importlib, os
import diffnl
for name in {[path.stem for path in ADAPTERS]}:
    if os.fork() == 0:
        importlib.import_module(f"diffnl.adapters.{{name}}")
        break
    assert os.wait()[1] == 0, name
"""


def test_importing_an_adapter_imports_no_package():
    run(BLOCKED + IMPORT_EACH)


def test_the_block_blocks():
    with pytest.raises(AssertionError, match="ase was imported"):
        run(f"{BLOCKED}\nimport ase")


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_an_adapter_has_tests_a_recipe_and_a_benchmark(path):
    page = (ROOT / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    imported = rf"diffnl\.adapters(\.{path.stem}\b| import .*\b{path.stem}\b)"
    assert any(re.search(imported, block) for block in blocks), "no recipe in docs/integrations.md"
    tests = [test.read_text() for test in (ROOT / "tests" / "adapters").glob("*/test_*.py")]
    assert any(re.search(imported, test) for test in tests), "no test in tests/adapters"
    assert (ROOT / "benchmarks" / "adapters" / f"{path.stem}.py").exists()
