"""Jobs over vLLM itself, on the CPU: its weights follow the student's (make test-vllm)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_phf.demo.task import make_hf_directory
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm.http import Patience
from megatron_phf.rollout.vllm.server import Question, VllmServer
from tests.doorway import Doorway
from tests.end_to_end.test_vllm_job import (
    BATCH,
    STEPS,
    flags,
    save_with_large_weights,
    write_problems,
)
from tests.launch import torchrun
from tests.real_vllm.server import RealVllm

# fp32 of two implementations; weights of one step before differ by 0.1 nats and more.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The embedded task's model with heads of 64: vLLM's attention on the CPU has none of 24.

    Prompts begin alike for more than one block of vLLM's prefix cache: what it keeps of older
    weights would be seen.
    """
    directory = tmp_path_factory.mktemp("vllm")
    make_hf_directory(str(directory / "hf"), seed=5)
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(directory / "hf", head_dim=64))
    save_with_large_weights(model, directory / "hf")
    shutil.copytree(directory / "hf", directory / "served")
    write_problems(directory)
    (directory / "student.txt").write_text(f"{'1+2=3;' * 8}{{problem}}=")
    return directory


@pytest.fixture(scope="module")
def adapters(files: Path, tmp_path_factory) -> Iterator[RealVllm]:
    """Serves the model with adapters."""
    more = ("--enable-lora", "--max-lora-rank", "8", "--block-size", "32")
    logs = tmp_path_factory.mktemp("adapters")
    with RealVllm(files / "hf", logs, *more, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        yield server


@pytest.fixture(scope="module")
def checkpoints(files: Path, tmp_path_factory) -> Iterator[RealVllm]:
    """Serves the directory that a job writes to."""
    logs = tmp_path_factory.mktemp("checkpoints")
    more = ("--block-size", "32")
    with RealVllm(files / "served", logs, *more, VLLM_SERVER_DEV_MODE="1") as server:
        yield server


@pytest.fixture(scope="module")
def transfers(files: Path, tmp_path_factory) -> Iterator[RealVllm]:
    """Gets weights from the job's processes, by the receiver that the package brings."""
    logs = tmp_path_factory.mktemp("transfers")
    more = ("--block-size", "32", "--weight-transfer-config", '{"backend": "torch_distributed"}')
    with RealVllm(files / "hf", logs, *more, VLLM_SERVER_DEV_MODE="1") as server:
        yield server


def drift_of_job(
    files: Path, server: RealVllm, output: Path, *more: str, kill_in: int | None = None
) -> list[float]:
    """``rollout_drift`` of each step of a job of two processes.

    ``kill_in``: the step whose second question finds no server; it is started again then.
    """
    number = 0 if kill_in is None else (kill_in - 1) * BATCH + 2
    with (
        Doorway(server.url, "/v1/completions", number, server.kill) as door,
        ThreadPoolExecutor(1) as pool,
    ):
        argv = flags(files, door.url, "--tensor-model-parallel-size", "2", *more)
        argv += ["--vllm-concurrency", "1", "--vllm-backoff-seconds", "1"]
        argv += ["--vllm-timeout-seconds", "120", "--output-dir", str(output)]
        job = pool.submit(torchrun, 2, "examples/pretrain_phf.sh", *argv, timeout=600)
        if kill_in is not None:
            while not door.acted.wait(0.1):
                assert not job.done(), job.result().stderr[-3000:]
            server.start()
        done = job.result()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    drift = [step["rollout_drift"] for step in steps]
    print(f"{output.name}: rollout_drift {drift}")
    assert len(steps) == STEPS
    assert all(step["rollout_tokens"] >= BATCH for step in steps)
    return drift


def test_adapters_follow_the_student(files: Path, adapters: RealVllm, tmp_path: Path) -> None:
    assert max(drift_of_job(files, adapters, tmp_path, "--lora-rank", "4")) < ROUNDING


def test_a_killed_server_gets_its_adapter_again(files: Path, adapters, tmp_path: Path) -> None:
    before = adapters.log().count("POST /v1/load_lora_adapter")
    drift = drift_of_job(files, adapters, tmp_path, "--lora-rank", "4", kill_in=2)
    assert max(drift) < ROUNDING
    assert adapters.log().count("POST /v1/load_lora_adapter") - before == STEPS + 1


def test_checkpoints_follow_the_student(files: Path, checkpoints, tmp_path: Path) -> None:
    sync = ("--vllm-sync-dir", str(files / "served"))
    assert max(drift_of_job(files, checkpoints, tmp_path, *sync)) < ROUNDING


def test_weights_of_one_step_before_show(files: Path, checkpoints, tmp_path: Path) -> None:
    more = ("--vllm-sync-dir", str(files / "served"), "--vllm-sync-interval", "2")
    drift = drift_of_job(files, checkpoints, tmp_path, *more)
    assert max(drift[0], drift[2]) < ROUNDING
    assert drift[1] > 1e-2


def test_a_killed_server_reads_the_newest_checkpoint(files: Path, checkpoints, tmp_path) -> None:
    """And takes the next one too, though it read a tied head as one of its own."""
    before = checkpoints.log().count("POST /collective_rpc")
    sync = ("--vllm-sync-dir", str(files / "served"))
    assert max(drift_of_job(files, checkpoints, tmp_path, *sync, kill_in=2)) < ROUNDING
    assert checkpoints.log().count("POST /collective_rpc") - before == STEPS


TRANSFER = ("--vllm-weight-sync", "torch_distributed")


def test_weights_without_a_disk_follow_the_student(files: Path, transfers, tmp_path: Path) -> None:
    assert max(drift_of_job(files, transfers, tmp_path, *TRANSFER)) < ROUNDING
    paths = ("start_weight_update", "update_weights", "finish_weight_update", "pause", "resume")
    assert [transfers.log().count(f"POST /{path}") for path in paths] == [STEPS] * len(paths)


def test_a_killed_server_gets_all_weights_again(files: Path, transfers, tmp_path: Path) -> None:
    """It comes back with the first step's, and says nothing of it."""
    before = transfers.log().count("POST /finish_weight_update")
    assert max(drift_of_job(files, transfers, tmp_path, *TRANSFER, kill_in=2)) < ROUNDING
    assert transfers.log().count("POST /finish_weight_update") - before == STEPS + 1


def test_a_seed_gives_the_same_tokens_alone_and_among_others(files: Path, adapters) -> None:
    server = VllmServer(adapters.url, Patience(60.0, 0, 1.0))
    sampling = SamplingParams(1.3, 0.9, 12, 20, (1,), seed=3)

    def ask(seed: int) -> Response:
        question = Question([5, 6, 7], sampling, seed, 20)
        until = time.monotonic() + 60
        return server.complete(question, str(files / "hf"), 10**6, until, Event(), lambda: None)

    alone = [ask(seed).token_ids for seed in (11, 12, 13, 14)]
    with ThreadPoolExecutor(4) as pool:
        together = [r.token_ids for r in pool.map(ask, (11, 12, 13, 14))]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) == 4
