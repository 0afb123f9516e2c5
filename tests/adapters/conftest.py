"""Counts the checks of each adapter and writes them down for `table.py`.

Each test module says `ADAPTER`, what its row is called, and `PACKAGES`, the distributions it is held against.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest

ROWS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[ROWS] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    row = item.config.stash[ROWS].setdefault(
        item.module.ADAPTER,
        {
            "packages": {name: version(name) for name in item.module.PACKAGES},
            "passed": 0,
            "failed": 0,
            "skipped": 0,
        },
    )
    row[report.outcome] += 1


def pytest_sessionfinish(session):
    if "ADAPTERS_RESULTS" in os.environ:
        path = Path(os.environ["ADAPTERS_RESULTS"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(session.config.stash[ROWS], indent=1))
