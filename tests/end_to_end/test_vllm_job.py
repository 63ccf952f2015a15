"""Jobs whose rollouts come from servers with vLLM's endpoints over transformers and peft models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_phf.demo.task import make_hf_directory, make_problems
from megatron_phf.runtime import parallel
from tests.end_to_end.test_bad_input import fails_once
from tests.fake_vllm import SHIFT, FakeVllm, sample
from tests.launch import torchrun
from tests.parallel.cases import launch

SCRIPT = "examples/pretrain_phf.sh"
BATCH, STEPS, SEED = 4, 3, 21
TEMPERATURE, TOP_P, TOP_K = 1.3, 0.9, 12


def save_with_large_weights(model: PreTrainedModel, path: Path) -> None:
    """Large enough that its tokens depend on them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.12)
    model.save_pretrained(path)


def write_problems(directory: Path) -> None:
    """12 of the embedded task, and both templates."""
    (directory / "student.txt").write_text("{problem}=")
    (directory / "teacher.txt").write_text("{problem}|{solution}=")
    with open(directory / "problems.jsonl", "w") as f:
        for p in make_problems("train", 12, seed=3):
            f.write(json.dumps({"problem": p.problem, "solution": p.solution}) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model whose tokens depend on its weights, and problems."""
    directory = tmp_path_factory.mktemp("vllm")
    make_hf_directory(str(directory / "hf"), seed=5)
    model = AutoModelForCausalLM.from_pretrained(directory / "hf")
    save_with_large_weights(model, directory / "hf")
    shutil.copytree(directory / "hf", directory / "served")
    write_problems(directory)
    return directory


def flags(files: Path, url: str, *more: str) -> list[str]:
    values = {
        "hf-model": files / "hf",
        "data": files / "problems.jsonl",
        "student-template": files / "student.txt",
        "teacher-template": files / "teacher.txt",
        "rollout-engine": "vllm",
        "vllm-url": url,
        "vllm-backoff-seconds": 0.1,
        "vllm-timeout-seconds": 20,
        "global-batch-size": BATCH,
        "micro-batch-size": 2,
        "train-iters": STEPS,
        "max-new-tokens": 10,
        "max-prompt-length": 128,
        "max-teacher-prompt-length": 200,
        "rollout-temperature": TEMPERATURE,
        "rollout-top-p": TOP_P,
        "rollout-top-k": TOP_K,
        "seed": SEED,
        "lr": 3e-2,
        "clip-grad": 1.0,
        "dtype": "fp32",
    }
    pairs = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*pairs, "--no-tensorboard", "--no-progress", *more]


@pytest.fixture(scope="module")
def results(files: Path, tmp_path_factory) -> dict:
    """Both ways to bring the weights over, in one start of two processes."""
    output = tmp_path_factory.mktemp("results")
    # Trouble in step 1, a restart that loses the adapter in step 2, other numbers in step 3.
    faults = ["ok", "503", "truncated", "ok", "ok", "ok", "restart", "ok"]
    faults += ["ok", "ok", "ok", "ok"] + ["shifted_log_probs"] * BATCH
    with FakeVllm(str(files / "hf"), faults) as first, FakeVllm(str(files / "served")) as second:
        third = FakeVllm(str(files / "served"))
        adapter = flags(
            files, first.url, "--tensor-model-parallel-size", "2", "--lora-rank", "4",
            "--vllm-concurrency", "1", "--output-dir", str(output / "adapter"),
            "--record-rollouts", str(output / "rollouts.jsonl"),
        )  # fmt: skip
        checkpoint = flags(
            files, f"{second.url},{third.url}", "--vllm-sync-interval", "2",
            "--vllm-sync-dir", str(files / "served"), "--output-dir", str(output / "checkpoint"),
        )  # fmt: skip
        cases = {"adapter": adapter, "checkpoint": checkpoint}
        launch(2, [{"name": n, "kind": "job", "argv": a} for n, a in cases.items()], output)
        third.stop()
        metrics = {n: json.loads((output / f"{n}.json").read_text()) for n in cases}
        lines = (output / "rollouts.jsonl").read_text().splitlines()
        rollouts = [json.loads(line) for line in lines]
        return {**metrics, "rollouts": rollouts, "servers": (first, second, third), "at": output}


def test_adapters_follow_the_student_through_trouble_and_a_restart(results: dict) -> None:
    """The server samples with peft what the student computes in megatron, in each step anew."""
    server = results["servers"][0]
    drift = [step["rollout_drift"] for step in results["adapter"]]
    assert drift[0] < 1e-5 and drift[1] < 1e-5
    assert drift[2] == pytest.approx(SHIFT, abs=1e-4)
    warned = [step["rollout_drift_warning"] for step in results["adapter"]]
    assert warned == [False, False, True]
    loads = [b["lora_name"] for b in server.bodies("/v1/load_lora_adapter")]
    assert len(loads) == STEPS + 1 and len(set(loads)) == STEPS  # once more after the restart
    (name,) = server.adapters
    assert name == loads[-1] and name.endswith("-3")
    assert [p.name for p in (results["at"] / "adapter" / "vllm").iterdir()] == [name]
    assert {b["model"] for b in server.bodies("/v1/completions")} == set(loads)
    assert server.faults == []


def test_tokens_are_those_of_their_prompt_and_seed(results: dict, files: Path) -> None:
    """Step 1 has the model's own weights: transformers samples the same with the same seeds."""
    model = AutoModelForCausalLM.from_pretrained(files / "hf").eval()
    for i, rollout in enumerate(results["rollouts"][:BATCH]):
        body = {
            "prompt": rollout["student_prompt_ids"], "max_tokens": 10, "stop_token_ids": [1],
            "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K,
            "seed": parallel.derived_seed("vllm", SEED, i),
        }  # fmt: skip
        with torch.no_grad():
            assert sample(model, body)[0] == rollout["response_ids"]
    prompts = [tuple(r["student_prompt_ids"]) for r in results["rollouts"]]
    assert len(results["rollouts"]) == BATCH * STEPS == len(set(prompts))


def test_checkpoints_are_reloaded_every_second_step(results: dict) -> None:
    """In step 2 the servers are one update behind; the step after they are not."""
    drift = [step["rollout_drift"] for step in results["checkpoint"]]
    assert drift[0] < 1e-5 and drift[2] < 1e-5
    assert drift[1] > 1e-2
    for server in results["servers"][1:]:
        asked = [path for path, _ in server.log if path != "/v1/completions"]
        assert asked == ["/collective_rpc", "/reset_prefix_cache"] * 2
        assert len(server.bodies("/v1/completions")) == BATCH * STEPS / 2


def test_a_request_for_ever_refused_ends_all_ranks_with_one_error(files: Path, tmp_path) -> None:
    with FakeVllm(str(files / "served"), ["ok", "ok", "ok", "400"]) as server:
        more = ["--vllm-sync-dir", str(files / "served"), "--output-dir", str(tmp_path)]
        done = torchrun(2, SCRIPT, *flags(files, server.url, *more), timeout=120)
    fails_once(done, f"--vllm-url {server.url}: POST /v1/completions: status 400: 'scripted troubl")
