"""A job over vLLM itself, on the CPU: adapters follow the student (make test-vllm)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_phf.data.arithmetic import make_hf_directory
from tests.end_to_end.test_vllm_job import (
    BATCH,
    STEPS,
    flags,
    save_with_large_weights,
    write_problems,
)
from tests.launch import REPO, torchrun

PYTHON = Path(os.environ.get("VLLM_VENV", REPO / ".venv-vllm")) / "bin" / "python"
SECONDS_TO_START = 420


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The embedded task's model with heads of 64: vLLM's attention on the CPU has none of 24."""
    directory = tmp_path_factory.mktemp("vllm")
    make_hf_directory(str(directory / "hf"), seed=5)
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(directory / "hf", head_dim=64))
    save_with_large_weights(model, directory / "hf")
    write_problems(directory)
    return directory


def wait_until_it_answers(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def url(files: Path, tmp_path_factory) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(files / "hf"),
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "200", "--enable-lora",
        "--max-lora-rank", "8", "--max-num-seqs", "4",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
    }
    with open(log, "w") as f:
        server = subprocess.Popen(
            command, env=environment, stdout=f, stderr=f, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_it_answers(address, server, log)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def test_adapters_follow_the_student(files: Path, url: str, tmp_path: Path) -> None:
    """Every step's tokens have the student's log-probabilities: to fp32's rounding, not 1e-2."""
    done = torchrun(
        2, "examples/pretrain_phf.sh",
        *flags(files, url, "--tensor-model-parallel-size", "2", "--lora-rank", "4"),
        "--vllm-timeout-seconds", "120", "--max-prompt-length", "128",
        "--output-dir", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl"),
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        assert step["rollout_tokens"] >= BATCH
        assert step["rollout_drift"] < 1e-3
