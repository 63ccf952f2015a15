"""Rows of the acceptance: as JSON, and as the table for an issue and for docs/gpu.md."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_phf.files.replace import write_json

# In the order of the table: what needs attention comes first.
RESULTS = {
    "fail": "**FAIL**",
    "late": "not run: out of time",
    "pass": "pass",
    "shown": "shown",
    "skipped": "skipped",
}


@dataclass(frozen=True)
class Row:
    """One line of the table; ``result`` is one of RESULTS, ``why`` what was skipped for."""

    name: str
    measured: str
    required: str
    result: str
    why: str = ""

    @classmethod
    def judged(cls, name: str, measured: str, required: str, good: bool | None) -> Row:
        """``good`` None: shown without a verdict."""
        result = {True: "pass", False: "fail", None: "shown"}[good]
        return cls(name, measured, required, result)


def skipped(name: str, need: str) -> Row:
    """A row that this machine cannot fill."""
    return Row(name, "", "", "skipped", f"needs {need}")


def ordered(rows: list[Row]) -> list[Row]:
    """Failures first; within a result in the order of the run."""
    return sorted(rows, key=lambda row: list(RESULTS).index(row.result))


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| check | measured | required | result |", "|---|---|---|---|"]
    for row in ordered(rows):
        word = RESULTS[row.result] + (f": {row.why}" if row.why else "")
        lines.append(f"| {row.name} | {row.measured} | {row.required} | {word} |")
    return "\n".join(lines)


def write_report(path: str, machine: dict[str, Any], rows: list[Row], times: list[dict]) -> None:
    """Write the report; a later start may end this program."""
    report = {**machine, "rows": [asdict(row) for row in ordered(rows)], "cases": times}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_json(path, report)


def heading(report: dict[str, Any]) -> str:
    """Which machine, versions and model a report is about."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['device']}; {report['processes']} process(es); {report['model']}; {versions}; "
        f"{report['seconds']:.0f} s"
    )


def render(path: str) -> str:
    """The heading and table of a report on disk, for docs/gpu.md.

    Raises:
        ValueError: it is no report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        return f"{heading(report)}\n\n{table([Row(**row) for row in report['rows']])}"
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a report of the acceptance ({error})") from error
