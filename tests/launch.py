"""Start processes as users do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from megatron_phf.runtime.environment import set_cuda_defaults
from megatron_phf.runtime.environment import torchrun as local_ranks

REPO = Path(__file__).parent.parent
_MEASURED = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "memory_bytes")
_MEASURED += ("rollout_overlap",)


def environment() -> dict[str, str]:
    """One thread a process; this interpreter's scripts first on PATH; nothing from a hub.

    CUDA's variables are the product's.
    """
    scripts = str(Path(sys.executable).parent)
    variables = {
        **os.environ,
        "PATH": scripts + os.pathsep + os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    set_cuda_defaults(variables)
    return variables


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(command: list[str], timeout: float = 300, **kwargs) -> subprocess.CompletedProcess:
    """The finished command, its output captured as text."""
    return subprocess.run(
        command,
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **kwargs,
    )


def torchrun(processes: int, script: str, *arguments: str, timeout: float = 300):
    """So many ranks of a script, as the product's own tools start them."""
    return run([*local_ranks(processes), script, *arguments], timeout=timeout)


def unmeasured(step: dict) -> dict:
    """A step's metrics without what a clock or other programs on the machine decide."""
    return {key: value for key, value in step.items() if key not in _MEASURED}
