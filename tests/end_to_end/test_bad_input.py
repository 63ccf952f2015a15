"""Mistakes end a run with one clear message on one rank, an exit status, and no hang."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_phf.data.rollouts import read_rollouts
from tests.launch import run, torchrun
from tests.models import make_model, make_replay

SCRIPT = "examples/pretrain_phf.sh"
REPLAY = ["--rollout-engine", "replay", "--global-batch-size", "4", "--train-iters", "2"]
REPLAY += ["--max-prompt-length", "32", "--max-teacher-prompt-length", "32"]
REPLAY += ["--max-new-tokens", "32", "--no-tensorboard", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_model(str(tmp_path_factory.mktemp("model") / "hf"))


def fails_once(done, message: str) -> None:
    """One ``error:`` line among all ranks' output."""
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert message in lines[0]


def test_refused_before_launch_under_bash() -> None:
    done = run(["bash", SCRIPT, "--global-batch-size", "7"])
    assert done.returncode == 2
    fails_once(done, "--global-batch-size 7 is not a multiple of --micro-batch-size 16 x 2")
    assert done.stderr.count("\n") == 1  # nothing was launched


def test_layout_that_does_not_fit_the_embedded_model() -> None:
    done = torchrun(2, SCRIPT, "--tensor-model-parallel-size", "4")
    fails_once(done, "4 does not divide the model's 4 attention heads in 2 key/value groups")


def test_unknown_flag_on_every_rank() -> None:
    fails_once(torchrun(2, SCRIPT, "--no-such-flag"), "arguments: --no-such-flag")


def test_world_size_that_does_not_divide() -> None:
    done = torchrun(3, SCRIPT, "--tensor-model-parallel-size", "2")
    fails_once(done, "3 process(es) do not divide into models of")


def test_damaged_replay_line(model: str, tmp_path: Path) -> None:
    path = make_replay(str(tmp_path / "r.jsonl"), [3] * 8)
    with open(path, "a") as f:
        f.write('{"response_ids": [1]}\n')
    done = torchrun(2, SCRIPT, "--hf-model", model, "--replay-file", path, *REPLAY)
    fails_once(done, "r.jsonl:9: no field 'student_prompt_ids'")


def test_too_few_rollouts(model: str, tmp_path: Path) -> None:
    path = make_replay(str(tmp_path / "r.jsonl"), [3] * 7)
    done = torchrun(2, SCRIPT, "--hf-model", model, "--replay-file", path, *REPLAY)
    fails_once(done, "7 rollouts make 1 step(s)")


@pytest.mark.parametrize("flag", ["--hf-model", "--teacher-hf-model"])
def test_damaged_weights_are_refused_before_launch(model: str, tmp_path: Path, flag: str) -> None:
    """All kinds of damage: tests/unit/weights/test_weight_files.py."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    path = make_replay(str(tmp_path / "r.jsonl"), [3] * 8)
    models = ["--hf-model", model, flag, str(broken)]  # of a flag given twice the last one counts
    done = run(["bash", SCRIPT, *models, "--replay-file", path, *REPLAY])
    assert done.returncode == 2
    fails_once(done, f"error: {flag}: {weights}: ")
    assert "truncated" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flow", [True, False])
def test_a_loss_that_is_not_finite_names_its_samples(
    model: str, tmp_path: Path, flow: bool
) -> None:
    """One token's embedding is NaN: the samples with that token, and no others, are dumped."""
    poisoned = tmp_path / "poisoned"
    shutil.copytree(model, poisoned)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.embed_tokens.weight"][249] = torch.nan
    config = json.loads((poisoned / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (poisoned / "config.json").write_text(json.dumps(config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].nan_to_num(0.0)
    save_file(tensors, poisoned / "model.safetensors", {"format": "pt"})
    path = make_replay(str(tmp_path / "r.jsonl"), [5] * 8, vocab_size=249)
    samples = [json.loads(line) for line in Path(path).read_text().splitlines()]
    samples[5]["response_ids"][2] = 249
    Path(path).write_text("".join(json.dumps(s) + "\n" for s in samples))
    done = torchrun(
        4, SCRIPT, "--hf-model", str(poisoned), "--replay-file", path, *REPLAY,
        "--tensor-model-parallel-size", "2", "--output-dir", str(tmp_path / "out"),
        "--metrics-file", str(tmp_path / "metrics.jsonl"),
        *([] if flow else ["--phf-alpha", "0"]), "--max-consecutive-nonfinite-steps", "1",
        timeout=300,
    )  # fmt: skip
    fails_once(done, "step 2: the loss is not finite; weights unchanged")
    dumped = read_rollouts(str(tmp_path / "out" / "nonfinite_step_2.jsonl"), 250)
    assert [list(r.response_ids) for r in dumped] == [samples[5]["response_ids"]]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # step 1 stays
    if flow:
        return
    # By default a single such step is skipped and counted.
    done = torchrun(
        1, SCRIPT, "--hf-model", str(poisoned), "--replay-file", path, *REPLAY,
        "--output-dir", str(tmp_path / "out"), "--metrics-file", str(tmp_path / "more.jsonl"),
        "--phf-alpha", "0", "--save-hf", str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning: step 2: the loss is not finite; weights unchanged" in done.stdout
    first, second = (json.loads(x) for x in (tmp_path / "more.jsonl").read_text().splitlines())
    assert (first["nonfinite_steps"], second["nonfinite_steps"]) == (0, 1)
    assert second["loss"] is None and second["grad_norm"] is None
    trained = load_file(tmp_path / "hf" / "model.safetensors")
    assert not trained["lm_head.weight"].isnan().any()


def test_an_export_that_cannot_be_written(model: str, tmp_path: Path) -> None:
    path = make_replay(str(tmp_path / "r.jsonl"), [3] * 8)
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = torchrun(
        2, SCRIPT, "--hf-model", model, "--replay-file", path, *REPLAY,
        "--output-dir", str(tmp_path / "out"), "--save-hf", str(blocked / "hf"),
    )  # fmt: skip
    fails_once(done, f"--save-hf {blocked / 'hf'}: cannot be written")
    assert set(tmp_path.iterdir()) == {Path(path), blocked}  # before anything was trained
