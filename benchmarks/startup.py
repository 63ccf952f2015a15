"""Start-up: seconds until ``--help`` has answered, and what it imports.

python -m benchmarks.startup '{"rounds": 5}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.harness import REPO, Spread, report, seconds_of


def measure(rounds: int) -> dict[str, Any]:
    """The launch script's ``--help``, as users start it."""
    command = ["bash", "examples/pretrain_phf.sh", "--help"]

    def answer() -> None:
        subprocess.run(command, cwd=REPO, capture_output=True, check=True)

    answer()
    times = [seconds_of(answer) for _ in range(rounds)]
    code = "import sys, megatron_phf.flags; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    return {
        "help_seconds": Spread.of(times).as_json(),
        "imports_torch": done.stdout.strip() == "True",
    }


if __name__ == "__main__":
    report(measure(**json.loads(sys.argv[1])))
