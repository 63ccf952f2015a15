"""Run the benchmarks: a table and JSON under benchmarks/results/.

python -m benchmarks                 one figure of each kind, a few minutes: results/quick/
python -m benchmarks --all           every figure of docs/performance.md: results/
python -m benchmarks NAME [NAME ..]  some of the latter
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import REPO
from benchmarks.suites import ALL, QUICK

RESULTS = REPO / "benchmarks" / "results"


def flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """(name, number) of every leaf; a spread is one."""
    if isinstance(value, dict) and value.keys() == {"median", "low", "high"}:
        return [(prefix, f"{value['median']:.4g} [{value['low']:.4g}, {value['high']:.4g}]")]
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in flat(f"{prefix}.{k}", v)]
    return [(prefix, f"{value:.4g}" if isinstance(value, float) else str(value))]


def write_table(directory: Path) -> None:
    """table.md of all JSON in ``directory``, also that of earlier runs."""
    rows = ["| figure | median [quartiles] |", "|---|---|"]
    for path in sorted(directory.glob("*.json")):
        rows += [f"| {k} | {v} |" for k, v in flat(path.stem, json.loads(path.read_text()))]
    (directory / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    """Run what the command line names and write each one's results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="see docs/performance.md"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--all", action="store_true", help="every figure: about 40 minutes")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - ALL.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ALL)}")
    in_full = arguments.all or arguments.names
    suite, directory = (ALL, RESULTS) if in_full else (QUICK, RESULTS / "quick")
    directory.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name in arguments.names or suite:
        found = suite[name]()
        (directory / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(*(f"{key:<60} {number}" for key, number in flat(name, found)), sep="\n", flush=True)
    write_table(directory)
    print(f"{time.perf_counter() - start:.0f} s in all; table: {directory / 'table.md'}")


if __name__ == "__main__":
    main()
