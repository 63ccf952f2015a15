"""A job with LoRA as users start it: its summary, exports that check, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch import run, torchrun
from tests.models import make_adapter, make_model, make_replay

SCRIPT = "examples/pretrain_phf.sh"
LORA = ["--lora-rank", "8", "--lora-alpha", "12"]
REPLAY = ["--rollout-engine", "replay", "--global-batch-size", "4", "--train-iters", "2"]
REPLAY += ["--max-prompt-length", "32", "--max-teacher-prompt-length", "32", "--lr", "1e-3"]
REPLAY += ["--max-new-tokens", "32", "--no-tensorboard", "--dtype", "fp32"]
REPLAY += ["--tensor-model-parallel-size", "2", *LORA]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("lora_job")
    model = make_model(str(directory / "model"))
    adapter = make_adapter(str(directory / "adapter"), model)
    damaged = Path(make_adapter(str(directory / "damaged"), model), "adapter_model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    return {
        "model": model,
        "adapter": adapter,
        "damaged": str(directory / "damaged"),
        "replay": make_replay(str(directory / "r.jsonl"), [3, 9, 5, 12] * 2),
    }


def job(files: dict[str, str], *more: str):
    real = ["--hf-model", files["model"], "--replay-file", files["replay"]]
    return torchrun(2, SCRIPT, *real, *REPLAY, *more)


def test_exports_check(files: dict[str, str], tmp_path: Path) -> None:
    """New adapters, trained; both exports compute what the student does, and not the base.

    A preset, and the job's own flags before it: the summary says where they depart from it.
    """
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    outputs = ["--save-adapter", adapter, "--save-hf", merged, "--output-dir"]
    done = job(files, *outputs, str(tmp_path / "out"), "--preset", "phf")
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("recipe "))
    assert line.startswith(
        "recipe   preset phf; departs from it: --rollout-engine replay (megatron)"
    )
    assert "--lora-rank 8 (64), --lora-alpha 12.0 (128.0), --train-iters 2 (100)" in line
    assert "teacher ema" in done.stdout and "dropout 0.05" in done.stdout
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["config"]["recipe"] == {"preset": "phf"}
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    rates = [json.loads(row)["learning_rate"] for row in metrics.splitlines()]
    assert rates == pytest.approx([1e-3, 1e-3], rel=1e-8)  # flat: 27,594 steps of decay
    # 4 layers x rank 8 x (in + out) of q, k, v, o, gate, up, down
    widths = (64 + 128) + 2 * (64 + 64) + (128 + 64) + 3 * (64 + 128)
    assert f"{4 * 8 * widths / 1e6:.2f} M trainable of " in done.stdout
    assert json.loads(Path(adapter, "adapter_config.json").read_text())["r"] == 8
    tensors = load_file(Path(adapter, "adapter_model.safetensors"))
    assert all(float(tensor.norm()) > 0 for tensor in tensors.values())
    probe = str(tmp_path / "out" / "export_probe.safetensors")
    for directory, status in ((adapter, 0), (merged, 0), (files["model"], 1)):
        check = run(["python3", "tools/check_export.py", directory, probe, "--tolerance", "1e-4"])
        assert check.returncode == status, (directory, check.stdout, check.stderr)


def fails_once(done, message: str) -> None:
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert message in lines[0]


def test_damaged_adapter(files: dict[str, str], tmp_path: Path) -> None:
    done = job(files, "--lora-adapter", files["damaged"], "--output-dir", str(tmp_path))
    fails_once(done, "adapter_model.safetensors: truncated, or not a safetensors file")


def test_an_adapter_that_cannot_be_written(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = str(tmp_path / "file" / "adapter")
    done = job(files, "--save-adapter", target, "--output-dir", str(tmp_path / "out"))
    fails_once(done, f"--save-adapter {target}: cannot be written")
