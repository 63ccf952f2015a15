"""A server of the run's own: its command, and that nothing of it is left, however the run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_phf.config.flags import parse_args
from megatron_phf.rollout.vllm import launch, watch
from megatron_phf.rollout.vllm.flags import check_vllm, launch_words
from megatron_phf.runtime.environment import set_cuda_defaults
from tests.launch import free_port

FLAGS = ["--hf-model", "m", "--data", "d", "--rollout-engine", "vllm"]
TRANSFER = ["--vllm-weight-sync", "torch_distributed"]
# Writes its process id and that of a child which does not heed SIGTERM; answers /health.
SERVER = """#!{python}
import http.server, json, os, subprocess, sys
child = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600; :"])
print("arguments", json.dumps(sys.argv[1:]), flush=True)
if "--broken" in sys.argv:
    child.kill()
    sys.exit("no such model")
open("{pids}", "w").write(json.dumps([os.getpid(), child.pid, dict(os.environ)]))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``vllm`` on PATH; where it writes its process ids."""
    program, pids = tmp_path / "vllm", tmp_path / "pids.json"
    program.write_text(SERVER.format(python=sys.executable, pids=pids))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    return pids


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "on_first_rank", lambda action: action())


def config_of(tmp_path: Path, flags: str) -> object:
    return parse_args(
        [*FLAGS, f"--vllm-launch={flags}", *TRANSFER, "--output-dir", str(tmp_path / "out")]
    )


def test_a_server_of_the_runs_own(
    vllm: Path, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}  # the user's own
    set_cuda_defaults(rank)
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    config, (watcher,) = launch.launched(
        config_of(tmp_path, "CUDA_VISIBLE_DEVICES=3 --max-num-seqs 9")
    )
    assert config.vllm.vllm_url.startswith("http://127.0.0.1:")
    server, child, environment = json.loads(vllm.read_text())
    assert environment["CUDA_VISIBLE_DEVICES"] == "3" and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert {name: environment.get(name) for name in rank} == {
        **dict.fromkeys(rank),
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
    }
    log = (tmp_path / "out" / "vllm-server.log").read_text()
    assert '["serve", "m", "--max-num-seqs", "9", "--weight-transfer-config"' in log
    assert not is_gone(server) and not is_gone(child)
    watcher.stdin.close()  # as the end of the process does
    watcher.wait(60)
    assert soon(lambda: is_gone(server) and is_gone(child))


def test_a_killed_run_leaves_no_server(vllm: Path, tmp_path: Path) -> None:
    """SIGKILL of the process that started it, as ``launched`` does."""
    command = [sys.executable, watch.__file__, str(tmp_path / "vllm"), "--port", str(free_port())]
    code = (
        "import subprocess, time\n"
        f"kept = subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)"
    )
    job = subprocess.Popen([sys.executable, "-c", code])
    assert soon(lambda: vllm.exists() and vllm.read_text().endswith("}]"))
    server, child, _ = json.loads(vllm.read_text())
    assert not is_gone(server) and not is_gone(child)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert soon(lambda: is_gone(server) and is_gone(child))


def test_a_server_that_does_not_start_is_an_error_with_its_log(
    vllm: Path, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"the server has ended with 1 .*\n(.*\n)*no such model"):
        launch.launched(config_of(tmp_path, "--broken"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="--vllm-launch '': there is no vllm on PATH"):
        launch.launched(config_of(tmp_path, ""))


def test_flags_that_the_way_of_the_weights_needs() -> None:
    launched = [*FLAGS, "--vllm-launch=A=1 --max-num-seqs 9"]
    variables, words = launch_words(parse_args([*launched, "--lora-rank", "4", "--vllm-colocated"]))
    assert variables["A"] == "1"
    assert words[2:] == ["--enable-lora", "--max-lora-rank", "4", "--enable-sleep-mode"]
    given = [*FLAGS, "--vllm-launch=--weight-transfer-config=x", *TRANSFER]
    assert launch_words(parse_args(given))[1] == ["--weight-transfer-config=x"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vllm-url", "http://a:1"], "takes the place of --vllm-url"),
        (["--rollout-engine", "megatron"], "takes the place of --vllm-url"),
        ([], "send whole weights without files"),
        (["--vllm-launch=--port 1", *TRANSFER], "--host and --port are the run's to choose"),
        (["--vllm-launch='", *TRANSFER], "No closing quotation"),
        ([*TRANSFER, "--vllm-sync-dir", "x"], "writes no files"),
    ],
)
def test_what_does_not_fit_a_launch_is_refused(flags: list[str], message: str) -> None:
    launched = [*FLAGS, "--vllm-launch="]
    check_vllm(parse_args([*launched, *TRANSFER]))
    with pytest.raises(ValueError, match=message):
        check_vllm(parse_args([*launched, *flags]))
