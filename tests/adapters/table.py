"""The table of what `make test-adapters` has run: adapter, packages with their versions, checks.

python tests/adapters/table.py build/adapters/*.json
"""

import json
import sys
from pathlib import Path


def main(paths: list[str]) -> int:
    rows: dict[str, dict] = {}
    for path in paths:
        for adapter, found in json.loads(Path(path).read_text()).items():
            row = rows.setdefault(adapter, {"packages": {}, "passed": 0, "failed": 0, "skipped": 0})
            row["packages"] |= found["packages"]
            for outcome in ("passed", "failed", "skipped"):
                row[outcome] += found[outcome]
    print(f"{'adapter':28}{'checks':>7}{'failed':>7}{'skipped':>8}  against")
    for adapter, row in sorted(rows.items(), key=lambda item: item[0].lower()):
        against = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
        counts = f"{row['passed']:>7}{row['failed']:>7}{row['skipped']:>8}"
        print(f"{adapter:28}{counts}  {against}")
    bad = not rows or any(row["failed"] or not row["passed"] for row in rows.values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
