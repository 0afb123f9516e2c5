"""Runs a recipe of docs/integrations.md: the Python block under a heading."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def run_recipe(heading: str) -> dict:
    """What the block under "## heading" leaves in its namespace."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    (section,) = [text for text in sections if text.splitlines()[0] == heading]
    blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    assert blocks, f"no ```python block under {heading}"
    names: dict = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, f"{PAGE.name}: {heading}", "exec"), names)
    return names
