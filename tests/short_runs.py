"""Benchmarks run for a moment, for the tests of what they print and write."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import neighbors  # noqa: E402


def run_neighbors(tmp_path, *arguments):
    """Exit status and JSON of a short run without memory measurements."""
    path = tmp_path / "neighbors.json"
    common = ["--threads", "1", "--budget", "0.001", "--no-memory", "--json", str(path)]
    return neighbors.main([*common, *arguments]), json.loads(path.read_text())
