"""Evaluation on a model whose every draw is known beforehand: the tool, and within training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.fake_vllm import FakeVllm
from tests.launch import run, torchrun
from tests.models import make_answering_model

TOOL, SCRIPT = "tools/evaluate.py", "examples/pretrain_phf.sh"
RIGHT, K, SEED = 0.7, 3, 5
ANSWERS = ["7", "3", "7", "9"]
FLAGS = ["--eval-samples", str(K), "--eval-seed", str(SEED), "--dtype", "fp32"]
FLAGS += ["--max-prompt-length", "32"]


def make_files(directory: Path) -> list[str]:
    """Flags that name a model which says 7 with probability 0.7, else 3, and its problems."""
    model = make_answering_model(str(directory / "hf"), RIGHT)
    data = directory / "sums.jsonl"
    lines = [
        {"problem": f"1+{i}", "answer": a, "solution": f"\\boxed{{{a}}}"}
        for i, a in enumerate(ANSWERS)
    ]
    data.write_text("".join(json.dumps(x) + "\n" for x in lines))
    for side, text in (("student", "{problem}"), ("teacher", "{problem}|{solution}")):
        (directory / f"{side}.txt").write_text(text)
    template = str(directory / "student.txt")
    files = ["--hf-model", model, "--eval-data", str(data), "--student-template", template]
    return [*files, *FLAGS]


def says(sample: int) -> str:
    """Sample n of the evaluation draws its second token with the second number of its stream."""
    generator = np.random.Generator(np.random.Philox(key=[SEED, sample]))
    return "7" if generator.random(2)[1] < RIGHT else "3"


def expected() -> list[list[bool]]:
    return [[says(p * K + draw) == a for draw in range(K)] for p, a in enumerate(ANSWERS)]


def majority() -> float:
    """Of three answers that are 7 or 3, one has the majority."""
    votes = [[says(p * K + draw) for draw in range(K)] for p in range(len(ANSWERS))]
    winners = [max(set(row), key=row.count) for row in votes]
    return float(np.mean([w == a for w, a in zip(winners, ANSWERS, strict=True)]))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return make_files(tmp_path_factory.mktemp("evaluate"))


def check_summary(directory: Path, output: str) -> None:
    report = json.loads((directory / "sums" / "summary.json").read_text())
    assert report["correct"] == expected()
    assert {True, False} == {good for row in expected() for good in row}
    mean = np.mean(expected())
    assert report["average_at_k"] == pytest.approx(mean)
    assert report["pass_at_k"] == np.mean([any(row) for row in expected()])
    assert report["majority_at_k"] == majority()
    assert report["interval_95"][0] <= mean <= report["interval_95"][1]
    assert f"Average@3 {100 * mean:.2f} %" in output


def test_every_draw_is_graded_as_it_must_be(files: list[str], tmp_path: Path) -> None:
    """Two ranks; killed after two problems; gone on with; graded again from the file alone."""
    arguments = [*files, "--output-dir", str(tmp_path), "--rollout-batch-size", str(K)]
    done = torchrun(2, TOOL, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    check_summary(tmp_path, done.stdout)
    kept = tmp_path / "sums" / "generations.jsonl"
    lines = kept.read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["problem"], first["answer"], len(first["answers"])) == ("1+0", "7", K)
    assert [a["text"] for a in first["answers"]] == [f"\\boxed{{{says(i)}}}" for i in range(K)]
    kept.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    again = torchrun(1, TOOL, *arguments)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "sums: 2 problems were done before" in again.stdout
    assert kept.read_text().splitlines() == lines
    check_summary(tmp_path, again.stdout)
    replay = ["--rollout-engine", "replay", "--replay-file", str(kept)]
    graded = run(["python", TOOL, *files, *replay])
    assert graded.returncode == 0, graded.stderr[-2000:]
    assert f"Average@3 {100 * np.mean(expected()):.2f} %" in graded.stdout


def test_evaluation_in_training(files: list[str], tmp_path: Path) -> None:
    """At rate 0 each evaluation is the same; one that a resume repeats is not there twice."""
    data, template = files[3], files[5]
    teacher = template.replace("student.txt", "teacher.txt")
    job = ["--data", data, "--teacher-template", teacher, "--max-teacher-prompt-length", "64"]
    job += ["--train-iters", "2", "--lr", "0", "--global-batch-size", "2", "--max-new-tokens", "8"]
    job += ["--eval-interval", "1", "--no-tensorboard", "--output-dir", str(tmp_path)]
    job += ["--save", str(tmp_path / "saved"), "--load", str(tmp_path / "saved")]
    job += ["--privileged", "hint:0.5-1", "--record-rollouts", str(tmp_path / "recorded.jsonl")]
    for more, steps in ((["--exit-interval", "1"], [0]), ([], [0, 1, 2])):
        done = torchrun(2, SCRIPT, *files, *job, *more)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records] == steps
        assert all(r["correct"] == expected() for r in records)
    mean = 100 * np.mean(expected())
    assert (
        f"evaluation: best {mean:.2f} % after step 0, last {mean:.2f} % after step 2" in done.stdout
    )
    assert records[0]["samples"][0]["reference"] == "\\boxed{7}"
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["run_name"], about["seed"], about["world_size"]) == ("train", 1234, 2)
    assert about["config"]["evaluation"]["eval_samples"] == K
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    tokenizer = AutoTokenizer.from_pretrained(files[1])
    lines = (tmp_path / "recorded.jsonl").read_text().splitlines()
    prompts = [tokenizer.decode(json.loads(x)["teacher_prompt_ids"]) for x in lines]
    # Two of a solution's three tokens in the first step, all of them after the resume.
    hints = [re.fullmatch(r".*\|(\\boxed\{\d\}?)<\|assistant\|>", x)[1] for x in prompts]
    assert [x.endswith("}") for x in hints] == [False, False, True, True]
    # The checkpoint's weights are what the tool evaluates, not those of --hf-model.
    broken = shutil.copytree(files[1], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({n: torch.zeros_like(w) for n, w in weights.items()}, broken / "model.safetensors")
    again = ["--load", str(tmp_path / "saved"), "--output-dir", str(tmp_path / "again")]
    done = torchrun(2, TOOL, "--hf-model", str(broken), *files[2:], *again)
    assert done.returncode == 0, done.stderr[-2000:]
    check_summary(tmp_path / "again", done.stdout)


def test_a_vllm_server_samples(files: list[str], tmp_path: Path) -> None:
    """It gets the weights of --hf-model; greedily the model always says 7."""
    served = shutil.copytree(files[1], tmp_path / "served")
    with FakeVllm(str(served)) as server:
        engine = ["--rollout-engine", "vllm", "--vllm-url", server.url]
        engine += ["--vllm-sync-dir", str(served), "--eval-temperature", "0"]
        done = torchrun(2, TOOL, *files, *engine, "--output-dir", str(tmp_path))
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(server.bodies("/v1/completions")) == len(ANSWERS) * K
    report = json.loads((tmp_path / "sums" / "summary.json").read_text())
    assert report["correct"] == [[answer == "7"] * K for answer in ANSWERS]


def test_mistakes(files: list[str], tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"problem": "1+1"}\n')
    (tmp_path / "aime2024.jsonl").write_text('{"problem": "1+1", "answer": 2}\n')
    preset = ["--preset", "aime2024", "--eval-dir", str(tmp_path)]
    for flags, message in (
        ([*files, "--eval-samples", "0"], "--eval-samples 0: need at least 1"),
        ([*files, "--eval-data", str(blank)], "problem 1 has no 'answer'; see --answer-field"),
        ([*files[:2], *preset], "aime2024.jsonl: 1 problems, but aime2024 has 30"),
        ([*files[:2], "--preset", "paper", *preset[2:]], "aime2025.jsonl is missing (30 problems"),
        (files[:2], "name either --eval-data FILE, or --preset and --eval-dir"),
    ):
        done = torchrun(1, TOOL, *flags)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], done.stderr[-2000:]
