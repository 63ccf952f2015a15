"""``--vllm-launch``: a vLLM server that starts and ends with the run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from megatron_phf.config.settings import Config
from megatron_phf.rollout.vllm import watch
from megatron_phf.rollout.vllm.flags import launch_words
from megatron_phf.rollout.vllm.sync import deadline
from megatron_phf.runtime.environment import without_defaults
from megatron_phf.runtime.together import on_first_rank

# torchrun's, which vLLM would take for its own.
_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
)
_LINES_SHOWN = 15


def launched(config: Config) -> tuple[Config, list[subprocess.Popen[bytes]]]:
    """The run's settings with the URL of a server that answers, and on rank 0 who watches over it.

    Unchanged without ``--vllm-launch``.  Every rank calls it.

    Raises:
        ValueError: the server does not start; with the end of its log, on every rank.
    """
    watchers: list[subprocess.Popen[bytes]] = []
    if config.vllm.vllm_launch is None:
        return config, watchers

    def launch() -> str:
        try:
            return _answering(config, watchers)
        except (OSError, ValueError) as error:
            raise ValueError(f"--vllm-launch {config.vllm.vllm_launch!r}: {error}") from error

    return config.replaced(vllm_url=on_first_rank(launch)), watchers


def _answering(config: Config, watchers: list[subprocess.Popen[bytes]]) -> str:
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        raise ValueError("the run is on several machines; start servers, and name them: --vllm-url")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", Path(config.output.output_dir) / "vllm-server.log"
    watchers.append(_start(config, port, log))
    _wait(watchers[0], url, log, deadline(config))
    return url


def _start(config: Config, port: int, log: Path) -> subprocess.Popen[bytes]:
    assert config.model.hf_model is not None, "checked before launch"
    program = shutil.which("vllm")
    if program is None:
        raise ValueError("there is no vllm on PATH")
    variables, words = launch_words(config)
    environment = {
        name: value
        for name, value in without_defaults(os.environ).items()
        if not (name in _LAUNCHER or name.startswith("TORCHELASTIC_"))
    } | variables
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [program, "serve", config.model.hf_model, *words, *address]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as f:
        # The pipe's other end is open as long as this process lives.
        return subprocess.Popen(
            [sys.executable, "-P", watch.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=f,
            stderr=f,
            env=environment,
            start_new_session=True,
        )


def _wait(watcher: subprocess.Popen[bytes], url: str, log: Path, until: float) -> None:
    opener = build_opener(ProxyHandler({}))
    while time.monotonic() < until:
        if watcher.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()[-_LINES_SHOWN:]
            end = "\n".join(lines)
            raise ValueError(f"the server has ended with {watcher.returncode} ({log}):\n{end}")
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise ValueError(f"the server does not answer (see {log})")
