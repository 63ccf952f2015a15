"""One line of the product, broken in a copy of the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.launch import REPO, environment


@dataclass(frozen=True)
class Breakage:
    """In ``file``, ``old`` becomes ``new``; ``tests`` (pytest arguments) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def run_tests(breakage: Breakage, directory: Path, broken: bool) -> int:
    """pytest's exit status for the breakage's tests in a copy of the tree."""
    tree = directory / "tree"
    shutil.copytree(REPO, tree, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    path = tree / breakage.file
    content = path.read_text()
    if content.count(breakage.old) != 1:
        raise SystemExit(f"{breakage.file}: the line to break is not there once: {breakage.old!r}")
    if broken:
        path.write_text(content.replace(breakage.old, breakage.new))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *breakage.tests],
        cwd=tree,
        env={**environment(), "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(tree)
    state = "broken" if broken else "whole"
    print(f"    {state}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return done.returncode
