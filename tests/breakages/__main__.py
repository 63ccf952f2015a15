"""Break the product on purpose, one line at a time, and see the tests turn red.

    make breakages        (python -m tests.breakages; about ten minutes)

Each breakage is made in a copy of the tree, after the same tests have passed in an unbroken one.
Exits with 1 if any of them goes unnoticed, or if the line that it breaks is no longer there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.breakages.breakage import run_tests
from tests.breakages.losses import LOSSES
from tests.breakages.model import MODEL
from tests.breakages.run import RUN


def main() -> int:
    """All breakages, a line each."""
    unnoticed, sound = 0, set()
    for breakage in (*LOSSES, *MODEL, *RUN):
        print(f"{breakage.name} ({breakage.file})", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            if breakage.tests not in sound and run_tests(breakage, Path(directory), broken=False):
                raise SystemExit("the tests fail without any breakage: mend that first")
            sound.add(breakage.tests)
            red = run_tests(breakage, Path(directory), broken=True) == 1  # 1: tests failed
        print(f"    {'RED, as it must be' if red else 'UNNOTICED'}", flush=True)
        unnoticed += not red
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
