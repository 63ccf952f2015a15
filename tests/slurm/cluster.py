"""The two-node SLURM cluster of local_slurm.sh, and jobs on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.launch import REPO, environment

TOOL = str(Path(__file__).parent / "local_slurm.sh")
# GPUs are pretended, so that a job asks for them and counts its ranks as on a real cluster.
SETTINGS = {"LOCAL_SLURM_GPUS": "2", "LOCAL_SLURM_CPUS": "4"}


class Cluster:
    """Starts at once; ``stop`` leaves no process and no file behind."""

    def __init__(self) -> None:
        # Not pytest's: munged wants a path that every user may enter.
        self.directory = tempfile.mkdtemp(prefix="slurm-")
        self.tool("start")
        self._environment = {
            **{k: v for k, v in environment().items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": f"{self.directory}/slurm.conf",
        }
        self._environment["PATH"] = f"{self.directory}/bin{os.pathsep}{self._environment['PATH']}"

    def tool(self, *command: str) -> None:
        """``local_slurm.sh COMMAND DIR ...``."""
        subprocess.run(
            ["bash", TOOL, command[0], self.directory, *command[1:]],
            env={**environment(), **SETTINGS}, check=True, timeout=300,
        )  # fmt: skip

    def stop(self) -> None:
        """Cancel the jobs and end the daemons."""
        self.tool("stop")
        shutil.rmtree(self.directory)

    def client(self, *command: str, **variables: str) -> str:
        """Standard output of a client command (squeue, scontrol, ...)."""
        done = subprocess.run(
            command, cwd=REPO, env={**self._environment, **variables},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, output: Path, *arguments: str, **variables: str) -> Job:
        """``sbatch ARGUMENTS``; what the job prints goes to ``output``."""
        options = ["sbatch", "--parsable", f"--output={output}"]
        return Job(self, self.client(*options, *arguments, **variables).strip(), output)


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    id: str
    output: Path

    def fields(self) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        shown = self.cluster.client("scontrol", "show", "job", "-o", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def text(self) -> str:
        """What the job has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
        """Wait; a job that ends in failure meanwhile fails the test at once."""
        end = time.monotonic() + seconds
        while not condition():
            state = self.fields()["JobState"]
            late = time.monotonic() > end
            ended = state in ("FAILED", "CANCELLED", "TIMEOUT") and not condition()
            assert not late and not ended, (
                f"{what}: not after {seconds} s, job {state}\n{self.text()[-6000:]}"
            )
            time.sleep(0.5)

    def wait_until(self, state: str, seconds: float = 600) -> None:
        """Wait for a job state."""
        self.wait_for(lambda: self.fields()["JobState"] == state, state, seconds)
