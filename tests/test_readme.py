"""Every Python block of the README runs as it stands, on its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """[(number of the first line, code)]"""
    text = README.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in FENCE.finditer(text)]


BLOCKS = blocks()


def test_the_readme_shows_python():
    assert BLOCKS, "README.md has no ```python block"


@pytest.mark.parametrize("line, code", BLOCKS, ids=[f"line_{line}" for line, _ in BLOCKS])
def test_block_runs(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Line numbers of a traceback are those of the README.
    exec(compile("\n" * (line - 1) + code, str(README), "exec"), {"__name__": "__main__"})
