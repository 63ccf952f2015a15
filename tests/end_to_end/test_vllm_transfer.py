"""A job whose weights reach servers over vLLM's weight-transfer API, from shards at TP 2 x PP 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_phf.demo.task import make_hf_directory
from tests.end_to_end.test_vllm_job import (
    BATCH,
    STEPS,
    flags,
    save_with_large_weights,
    write_problems,
)
from tests.fake_vllm import FakeVllm, servers_of, write_program
from tests.launch import REPO, environment, free_port
from tests.parallel.cases import launch
from tests.unit.rollout.test_vllm_launch import soon

LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
LAYOUT += ["--num-layers-in-first-pipeline-stage", "2"]  # of three


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Two servers: the first dies amid step 2's transfer, the second while step 3 samples."""
    files = tmp_path_factory.mktemp("transfer")
    make_hf_directory(str(files / "hf"), seed=5)
    model = AutoModelForCausalLM.from_pretrained(files / "hf")
    save_with_large_weights(model, files / "hf")
    write_problems(files)
    served = str(files / "hf")
    faults = ["ok"] * BATCH + ["restart"]
    with (
        FakeVllm(served, transfer=True, die_at_messages=(1,)) as first,
        FakeVllm(served, faults, transfer=True) as second,
    ):
        servers = (first, second)
        more = ["--vllm-weight-sync", "torch_distributed", "--vllm-colocated", *LAYOUT]
        argv = flags(files, f"{first.url},{second.url}", *more, "--output-dir", str(files / "out"))
        launch(4, [{"name": "job", "kind": "job", "argv": argv}], files)
        metrics = json.loads((files / "job.json").read_text())
        return {"servers": servers, "metrics": metrics, "files": files}


def test_servers_sample_with_the_students_weights_through_deaths(results: dict) -> None:
    drift = [step["rollout_drift"] for step in results["metrics"]]
    assert len(drift) == STEPS and max(drift) < 1e-5
    assert [step["policy_lag"] for step in results["metrics"]] == [0] * STEPS


def test_every_tensor_arrives_bit_for_bit_under_its_name(results: dict) -> None:
    """Before the first step the model's own; after it others."""
    original = load_file(results["files"] / "hf" / "model.safetensors")
    # A tied head goes too: layers without weights of their own would keep what was.
    wanted = {**original, "lm_head.weight": original["model.embed_tokens.weight"]}
    for server in results["servers"]:
        first, *_, last = server.transfers
        assert first.keys() == last.keys() == wanted.keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in wanted.items())
        changed = [name for name in wanted if not torch.equal(first[name], last[name])]
        assert len(changed) > len(wanted) / 2


def test_both_have_the_same_weights_at_the_end(results: dict) -> None:
    first, second = (server.received for server in results["servers"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_servers_sleep_while_the_models_train(results: dict) -> None:
    """Weights come back before they are sent, the cache after; the fake asserts the rest."""
    for server in results["servers"]:
        log = [path.partition("&")[0] for path, _ in server.log]
        sleeps = [i for i, path in enumerate(log) if path == "/sleep?level=2"]
        assert len(sleeps) == STEPS + 1 and sleeps[0] == 0
        wakes = [path for path in log if path.startswith("/wake_up")]
        assert wakes[:2] == ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
        first = log[1 : sleeps[1]]
        order = ["/wake_up?tags=weights", "/start_weight_update", "/update_weights"]
        order += ["/finish_weight_update", "/resume", "/wake_up?tags=kv_cache", "/v1/completions"]
        assert [first.index(path) for path in order] == sorted(first.index(p) for p in order)
        assert all(log[i] != "/v1/completions" for i in range(sleeps[-1], len(log)))


def start(arguments: list[str], program: Path, output: Path) -> subprocess.Popen:
    """One rank without a launcher."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = {**environment(), **one, **address}
    variables["PATH"] = f"{program.parent}{os.pathsep}{variables['PATH']}"
    with open(output, "ab") as f:
        return subprocess.Popen(
            [sys.executable, "examples/pretrain_phf.sh", *arguments],
            cwd=REPO, env=variables, stdout=f, stderr=f,
        )  # fmt: skip


def test_a_job_with_a_server_of_its_own_is_killed_and_goes_on(results: dict, tmp_path) -> None:
    """SIGKILL leaves no server; the next life starts another, and ends it."""
    files, out = results["files"], tmp_path / "out"
    write_program(tmp_path / "vllm")
    argv = flags(files, "", "--vllm-launch=--slots 4", "--vllm-weight-sync", "torch_distributed")
    at = argv.index("--vllm-url")
    argv = [*argv[:at], *argv[at + 2 :], "--output-dir", str(out), "--save-interval", "1"]
    argv += ["--save", str(tmp_path / "ckpt"), "--load", str(tmp_path / "ckpt")]
    saved = tmp_path / "ckpt" / "latest_checkpointed_iteration.txt"
    held = [word.replace("--slots 4", f"--slots 4 --slow-from {2 * BATCH}") for word in argv]
    first = start(held, tmp_path / "vllm", tmp_path / "log")  # does not get beyond step 2
    assert soon(lambda: saved.exists() or first.poll() is not None)
    assert servers_of(files / "hf"), (tmp_path / "log").read_text()[-3000:]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert soon(lambda: not servers_of(files / "hf"))
    done = int(saved.read_text())
    assert done < STEPS
    second = start(argv, tmp_path / "vllm", tmp_path / "log")
    assert second.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    assert soon(lambda: not servers_of(files / "hf"))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert max(step["rollout_drift"] for step in steps) < 1e-5
    assert f"after step {done}" in (tmp_path / "log").read_text()
    assert (out / "vllm-server.log").read_text().count("http://127.0.0.1:") == 2
