"""Every rollout engine keeps the protocol; a job reads a tool's output and does not score it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_phf import reference
from megatron_phf.demo.task import make_tokenizer
from megatron_phf.rollout.engines import ENGINES
from tests.end_to_end.test_bad_input import fails_once
from tests.end_to_end.test_vllm_job import write_problems
from tests.fake_vllm import FakeVllm
from tests.launch import torchrun
from tests.models import make_following_model, make_replay
from tests.parallel.cases import compare_metrics, launch

EXAMPLE = "examples.engines.calculator:make_engine"
CONTRACTS = [*ENGINES, EXAMPLE]
BATCH, NEW_TOKENS = 2, 12
# The student calls twice, the second time with what the tool wrote.
FOLLOWS = {
    last: {after: 1.0}
    for last, after in zip(
        ["<|assistant|>", "2", "+", "3", "=", "5", "-", "1", "4"],
        ["2", "+", "3", "=", "<|end|>", "-", "1", "=", "<|end|>"],
        strict=True,
    )
}
TEXT, MASK = "2+3=5-1=4", [1, 1, 1, 1, 0, 1, 1, 1, 0, 1]  # and the stop token


def flags(files: Path, engine: str, *more: str) -> list[str]:
    values = {
        "hf-model": files / "hf", "data": files / "problems.jsonl", "rollout-engine": engine,
        "student-template": files / "student.txt", "teacher-template": files / "teacher.txt",
        "global-batch-size": BATCH, "micro-batch-size": 1, "train-iters": 2, "dtype": "fp32",
        "max-new-tokens": NEW_TOKENS, "max-prompt-length": 64, "max-teacher-prompt-length": 128,
        "rollout-temperature": 0.0, "seed": 5, "vllm-backoff-seconds": 0.1,
        "tensor-model-parallel-size": 2, "output-dir": files / "out" / engine.split(":")[0],
    }  # fmt: skip
    pairs = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*pairs, "--no-tensorboard", "--no-progress", *more]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    make_following_model(str(directory / "hf"), FOLLOWS, noise=0.03, rest=-6.0)
    shutil.copytree(directory / "hf", directory / "served")
    write_problems(directory)
    make_replay(str(directory / "replay.jsonl"), [3, 9, 1, 4], vocab_size=32, masked=True)
    return directory


@pytest.fixture(scope="module")
def results(files: Path) -> Path:
    """All contracts and a job of the example, in one start of two processes."""
    out = files / "results"
    out.mkdir()
    with FakeVllm(str(files / "served")) as server:
        more = {
            "vllm": ["--vllm-url", server.url, "--vllm-sync-dir", str(files / "served")],
            "replay": ["--replay-file", str(files / "replay.jsonl")],
        }
        cases = [
            {"name": n, "kind": "engine", "argv": flags(files, n, *more.get(n, []))}
            for n in CONTRACTS
        ]
        record = ["--record-rollouts", str(files / "recorded.jsonl"), "--phf-alpha", "0.7"]
        cases.append({"name": "job", "kind": "job", "argv": flags(files, EXAMPLE, *record)})
        launch(2, cases, out)
    return out


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_contract_holds(name: str, results: Path, files: Path) -> None:
    found = json.loads((results / f"{name}.json").read_text())
    if name == EXAMPLE:
        assert found["texts"] == [TEXT, "2", "2+3=5", TEXT]  # limits 12, 1, 5, 12
        ends = [MASK, MASK[:1], MASK[:5], MASK]
        assert found["masks"] == [[bool(m) for m in mask] for mask in ends]
    elif name == "replay":
        assert found["rollouts"] == reference.read_replay(str(files / "replay.jsonl"))[:BATCH]
    elif name == "reference":
        lines = (files / "problems.jsonl").read_text().splitlines()
        solutions = [json.loads(line)["solution"] for line in lines]
        read = [make_tokenizer().decode(r["response_ids"]) for r in found["rollouts"]]
        assert all(any(s.startswith(text) for s in solutions) for text in read)
    else:
        assert found["texts"] == ["2+3=", "2", "2+3=", "2+3="]  # nobody answers a call
        assert found["masks"] == [None] * 4


def test_a_job_with_a_tool_trains_on_what_the_student_wrote(results: Path, files: Path) -> None:
    """Values of the first step as the reference has them of the rollouts that were recorded."""
    first, second = json.loads((results / "job.json").read_text())
    recorded = reference.read_replay(str(files / "recorded.jsonl"))
    assert len(recorded) == 2 * BATCH
    for rollout in recorded[:BATCH]:
        assert rollout["response_mask"] == MASK
        assert make_tokenizer().decode(rollout["response_ids"], skip_special_tokens=True) == TEXT
    expected = reference.compute(
        str(files / "hf"), recorded[:BATCH], reference.Options(alpha=0.7, window_size=128)
    )
    assert expected.metrics["rollout_tokens"] == BATCH * sum(MASK) == first["rollout_tokens"]
    assert expected.metrics["flow"] > 1e-6 and expected.metrics["opsd"] > 1e-6
    compare_metrics(first, expected.metrics, 1e-4)
    assert first["rollout_lengths"] == {"mean": 10.0, "min": 10, "max": 10, "cut": 0.0}
    assert (first["policy_lag"], second["policy_lag"]) == (0, 0)
    assert "rollout_drift" not in first  # the engine gave no log-probabilities


def test_the_model_does_what_the_test_says(files: Path) -> None:
    """transformers' own greedy continuation of a call that nobody answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(files / "hf"), make_tokenizer()
    ids = tokenizer("<|assistant|>", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(output[0, 1:]) == "2+3=<|end|>"


def test_a_wrong_answer_on_one_rank_ends_all_with_one_error(files: Path) -> None:
    """The rank that is right does not wait for ever."""
    engine = "tests.own_engines:short_on_one_rank"
    done = torchrun(2, "examples/pretrain_phf.sh", *flags(files, engine), timeout=300)
    fails_once(done, f"--rollout-engine {engine}: generate gave 1 responses to 2 prompts")
