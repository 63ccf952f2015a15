"""vLLM's own server on the CPU, in a process that a test may kill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.launch import REPO, free_port

PYTHON = Path(os.environ.get("VLLM_VENV", REPO / ".venv-vllm")) / "bin" / "python"
SECONDS_TO_START = 420


class RealVllm:
    """``with RealVllm(model, directory, *flags, VARIABLE="1") as server: server.url``."""

    def __init__(self, model: Path, logs: Path, *flags: str, **variables: str) -> None:
        port = free_port()
        self.url, self._log = f"http://127.0.0.1:{port}", logs / f"server-{port}.log"
        self._command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
            *("--enforce-eager", "--max-model-len", "200", "--max-num-seqs", "4", *flags),
        ]
        self._environment = {
            **os.environ,
            **variables,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        }

    def log(self) -> str:
        """All that it said, before a kill too."""
        return self._log.read_text()

    def start(self) -> None:
        """Returns once it answers."""
        with open(self._log, "a") as f:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=f, stderr=f, start_new_session=True
            )
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end:
            assert self._process.poll() is None, self.log()[-4000:]
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(self.log()[-4000:])

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """It and the processes it started, and the shared memory that it then cannot remove."""
        shared = self._shared_memory()
        if self._process.poll() is None:
            os.killpg(self._process.pid, how)
        self._process.wait(timeout=60)
        for path in shared:
            path.unlink(missing_ok=True)

    def _shared_memory(self) -> set[Path]:
        """The files of /dev/shm that its processes have mapped, by inode: some were renamed."""
        mapped = set()
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):  # a process that has just ended, or not ours
                if os.getpgid(int(maps.parent.name)) == self._process.pid:
                    lines = [line.split() for line in maps.read_text().splitlines()]
                    mapped |= {int(x[4]) for x in lines if len(x) > 5 and "/dev/shm/" in x[5]}
        return {path for path in Path("/dev/shm").iterdir() if path.stat().st_ino in mapped}

    def __enter__(self) -> RealVllm:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill(signal.SIGTERM)
