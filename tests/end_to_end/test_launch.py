"""The launch script as users call it: bash, torchrun, torchrun in a layout of four processes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.launch import run, torchrun
from tests.models import make_model

SCRIPT = "examples/pretrain_phf.sh"
SHORT = ["--warm-start-iters", "2", "--train-iters", "2", "--demo-seeds", "1"]
SHORT += ["--eval-problems", "3", "--eval-samples", "2", "--global-batch-size", "4"]
SHORT += ["--micro-batch-size", "1", "--max-new-tokens", "6", "--no-tensorboard"]
FOUR = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
FOUR += ["--num-layers-in-first-pipeline-stage", "2"]
FOUR += ["--num-layers-in-last-pipeline-stage", "1"]
STEP_KEYS = {
    "step", "loss", "opsd", "flow", "flow_direction", "flow_geometry", "flow_adjacent",
    "flow_direction_per_layer", "flow_geometry_per_layer", "flow_adjacent_per_pair", "grad_norm",
    "learning_rate", "clipped_fraction", "clip_mode", "teacher_entropy", "rollout_tokens",
    "student_entropy", "teacher_agreement", "copied_words", "collapse_signs",
    "seconds", "tokens_per_second", "peak_memory_bytes", "nonfinite_steps",
    "memory_bytes", "rollout_lengths", "mfu", "useful_tokens_fraction", "policy_lag",
}  # fmt: skip


def check_demo(directory: Path, output: str) -> None:
    """What a run of the embedded default leaves and prints."""
    summary = json.loads((directory / "summary.json").read_text())
    for key in ("base_average_at_2", "opsd_average_at_2", "phf_average_at_2"):
        assert 0 <= summary[key] <= 1
    assert summary["seeds"] == [1234]
    assert summary["steps"] == {"on_policy": 2, "global_batch_size": 4, "warm_start": 2}
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (directory / "report" / "report.html").read_text()
    assert "<h2>Result</h2>" in page and "warm_start" not in page
    supervised = (directory / "warm_start" / "metrics.jsonl").read_text().splitlines()
    assert len(supervised) == 2 and json.loads(supervised[0])["teacher_entropy"] is None
    phf = directory / "phf" / "seed1234"
    lines = (phf / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2]
    evaluations = (phf / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 2]
    assert summary["base_average_at_2"] == json.loads(evaluations[0])["average_at_k"]
    assert json.loads((phf / "run.json").read_text())["run_name"] == "phf"
    for step in steps:
        assert step.keys() == STEP_KEYS
        phases = {"rollout", "teacher", "student", "optimizer"}
        assert step["seconds"].keys() == step["memory_bytes"].keys() == phases
        lengths = step["rollout_lengths"]
        assert 1 <= lengths["min"] <= lengths["mean"] <= lengths["max"] <= 6
        assert 0 <= lengths["cut"] <= 1
        assert len(step["flow_direction_per_layer"]) == 3
        assert len(step["flow_adjacent_per_pair"]) == 2
    for text in ("layout   TP", "memory   ", "--- one aligned example ---", "teacher prompt: ",
                 "step 2/2 | loss", "held-out Average@2"):  # fmt: skip
        assert text in output, text


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A directory, and the run under bash that has written it."""
    directory = tmp_path_factory.mktemp("demo")
    return directory, run(["bash", SCRIPT, *SHORT, "--output-dir", str(directory)])


def test_bash(demo: tuple[Path, subprocess.CompletedProcess]) -> None:
    directory, done = demo
    assert done.returncode == 0, done.stderr[-2000:]
    check_demo(directory, done.stdout)
    assert "TP 1 x PP 1 (virtual 1) x DP 2" in done.stdout  # two processes on a CPU
    assert "Warning" not in done.stderr


def test_torchrun(demo: tuple[Path, subprocess.CompletedProcess]) -> None:
    """In the directory of the run before, whose files stay."""
    directory, _ = demo
    names = [f"phf/seed1234/{name}" for name in ("metrics.jsonl", "evaluations.jsonl", "run.json")]
    names += ["summary.json", "report.png"]
    before = {name: (directory / name).read_bytes() for name in names}
    done = run(["torchrun", SCRIPT, *SHORT, "--output-dir", str(directory)])
    assert done.returncode == 0, done.stderr[-2000:]
    check_demo(directory, done.stdout)
    assert {name: (directory / f"{name}.1").read_bytes() for name in names} == before
    assert f"files of an earlier run are kept: {directory}" in done.stdout


def test_torchrun_with_four_processes(tmp_path: Path) -> None:
    done = torchrun(4, SCRIPT, *SHORT, *FOUR, "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    check_demo(tmp_path, done.stdout)
    assert "TP 2 x PP 2 (virtual 1) x DP 1" in done.stdout


def test_help() -> None:
    done = run(["bash", SCRIPT, "--help"])
    assert done.returncode == 0
    assert "--phf-alpha" in done.stdout


def test_unknown_flag() -> None:
    done = run(["bash", SCRIPT, "--no-such-flag"])
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr


@pytest.fixture(scope="module")
def embedded_model(tmp_path_factory) -> str:
    """A HuggingFace directory with a tokenizer and a chat template."""
    from megatron_phf.demo.task import make_hf_directory

    path = str(tmp_path_factory.mktemp("model") / "hf")
    make_hf_directory(path, seed=3)
    return path


def problems(path: Path, count: int = 6) -> str:
    from megatron_phf.demo.task import make_problems

    lines = [
        json.dumps({"problem": p.problem, "solution": p.solution})
        for p in make_problems("train", count, 1)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def recorded(embedded_model: str, tmp_path_factory) -> Path:
    """A run on a HuggingFace model and a JSONL of problems that records its rollouts."""
    out = tmp_path_factory.mktemp("recorded")
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        (out / f"{side}.txt").write_text(text)
    done = torchrun(
        2, SCRIPT, "--hf-model", embedded_model, "--data", problems(out / "data.jsonl"),
        "--student-template", str(out / "student.txt"),
        "--teacher-template", str(out / "teacher.txt"), *REAL, "--output-dir", str(out),
        "--metrics-file", str(out / "metrics.jsonl"), "--save-hf", str(out / "hf"),
        "--record-rollouts", str(out / "rollouts.jsonl"), "--teacher", "ema",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out


REAL = ["--train-iters", "3", "--global-batch-size", "4", "--max-new-tokens", "8", "--lr", "1e-3"]
REAL += ["--max-prompt-length", "64", "--max-teacher-prompt-length", "128", "--dtype", "fp32"]
REAL += ["--seed", "9"]


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_recorded_rollouts_replay_to_the_same_steps(recorded: Path, embedded_model: str) -> None:
    done = torchrun(
        2, SCRIPT, "--hf-model", embedded_model, "--rollout-engine", "replay",
        "--replay-file", str(recorded / "rollouts.jsonl"), *REAL, "--teacher", "ema",
        "--pipeline-model-parallel-size", "2", "--num-layers-in-first-pipeline-stage", "2",
        "--num-layers-in-last-pipeline-stage", "1",
        "--output-dir", str(recorded / "replay"),
        "--metrics-file", str(recorded / "replayed.jsonl"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = metrics(recorded / "metrics.jsonl"), metrics(recorded / "replayed.jsonl")
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "opsd", "flow", "grad_norm", "teacher_entropy", "rollout_tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_data_order_and_no_repeats(recorded: Path) -> None:
    prompts = [tuple(r["student_prompt_ids"]) for r in metrics(recorded / "rollouts.jsonl")]
    assert len(prompts) == 12
    # 6 problems, 12 rollouts: two epochs, each problem once in each.
    assert len(set(prompts[:6])) == len(set(prompts[6:])) == 6
    assert prompts[:6] != prompts[6:]


def test_export_computes_what_the_student_computed(recorded: Path, embedded_model: str) -> None:
    probe = str(recorded / "export_probe.safetensors")
    check = ["python", "tools/check_export.py"]
    done = run([*check, str(recorded / "hf"), probe])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: largest difference" in done.stdout
    # The untrained model is another one, and damaged files are said to be.
    assert run([*check, embedded_model, probe]).returncode == 1
    assert run([*check, str(recorded / "hf"), str(recorded / "data.jsonl")]).returncode == 2
    exported = AutoModelForCausalLM.from_pretrained(recorded / "hf")
    assert exported.dtype is torch.float32
    trained, start = (
        load_file(Path(d) / "model.safetensors") for d in (recorded / "hf", embedded_model)
    )
    assert any(not torch.equal(trained[k], start[k]) for k in start)


def test_two_teachers(recorded: Path, embedded_model: str, tmp_path: Path) -> None:
    """Each problem's own, or the first; and the numbers of each."""
    words = []
    for seed, name in enumerate(("plus", "minus")):
        make_model(str(tmp_path / name), vocab_size=32, num_hidden_layers=2, seed=seed)
        shutil.copy(Path(embedded_model) / "tokenizer.json", tmp_path / name)
        words += ["--teacher-hf-model", f"{name}={tmp_path / name}"]
    problems = metrics(recorded / "data.jsonl")
    for problem, name in zip(problems, ["minus", None, "plus"] * 2, strict=True):
        problem["teacher"] = name
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    done = torchrun(
        1, SCRIPT, "--hf-model", embedded_model, "--data", str(tmp_path / "data.jsonl"), *REAL,
        "--student-template", str(recorded / "student.txt"),
        "--teacher-template", str(recorded / "teacher.txt"), *words,
        "--output-dir", str(tmp_path / "run"), "--save", str(tmp_path / "checkpoints"),
        "--record-rollouts", str(tmp_path / "rollouts.jsonl"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "teachers plus, minus: one at a time" in done.stdout
    given = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["teacher"]
    assert given["teacher_hf_model"] == f"plus={tmp_path}/plus,minus={tmp_path}/minus"
    rollouts, steps = metrics(tmp_path / "rollouts.jsonl"), metrics(tmp_path / "run/metrics.jsonl")
    # The order of the data is that of the run without teachers.
    prompts = [r["student_prompt_ids"] for r in metrics(recorded / "rollouts.jsonl")]
    assert [r["student_prompt_ids"] for r in rollouts] == prompts
    assert [r["teacher"] for r in rollouts].count("minus") == 4  # two problems, two epochs
    for i, step in enumerate(steps):
        own = {"plus": 0, "minus": 0}
        for rollout in rollouts[4 * i : 4 * i + 4]:
            own[rollout["teacher"]] += len(rollout["response_ids"])
        assert step["rollout_tokens_by_teacher"] == own
        parts = [(step["opsd_by_teacher"][name] or 0.0) * n for name, n in own.items()]
        assert sum(parts) == pytest.approx(step["opsd"] * step["rollout_tokens"])
    assert len(steps) == 3


def test_a_larger_teacher_on_policy(recorded: Path, embedded_model: str, tmp_path: Path) -> None:
    """Another width and depth, split over two stages, offloaded, and with fewer positions."""
    teacher, positions = tmp_path / "teacher", 56
    make_model(
        str(teacher), vocab_size=32, num_hidden_layers=6, hidden_size=128,
        max_position_embeddings=positions,
    )  # fmt: skip
    shutil.copy(Path(embedded_model) / "tokenizer.json", teacher)
    done = torchrun(
        2, SCRIPT, "--hf-model", embedded_model, "--data", str(recorded / "data.jsonl"),
        "--student-template", str(recorded / "student.txt"),
        "--teacher-template", str(recorded / "teacher.txt"), *REAL,
        "--max-teacher-prompt-length", str(positions - 1), "--max-new-tokens", "64",
        "--pipeline-model-parallel-size", "2", "--num-layers-in-first-pipeline-stage", "2",
        "--num-layers-in-last-pipeline-stage", "1",
        "--teacher-hf-model", str(teacher), "--teacher-offload", "--output-dir", str(tmp_path),
        "--metrics-file", str(tmp_path / "metrics.jsonl"),
        "--record-rollouts", str(tmp_path / "rollouts.jsonl"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "teacher  qwen3, 6 layers, hidden 128" in done.stdout
    assert "no direction term; its layers for the student's: 2,4,6" in done.stdout
    steps = metrics(tmp_path / "metrics.jsonl")
    assert len(steps) == 3
    assert all(step["flow"] > 0 and step["flow_direction"] is None for step in steps)
    rollouts = metrics(tmp_path / "rollouts.jsonl")
    ends = [len(r["teacher_prompt_ids"]) + len(r["response_ids"]) for r in rollouts]
    assert max(ends) == positions  # the teacher can read every response to its end
