"""tools/convert_checkpoint.py as users call it: verified, bounded in memory, whole or not there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.test_bad_input import fails_once
from tests.launch import run, torchrun
from tests.models import make_model, make_replay

TOOL = ["python", "tools/convert_checkpoint.py"]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
# Of a whole model, above a rank's own part: the process itself grows by half of one, more or less
# as the machine has memory to spare; a second copy of the model would be a whole one on top.
ROOM = 0.75


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """63 MiB of weights in 24 layers, none larger than 1.5 MB."""
    path = make_model(
        str(tmp_path_factory.mktemp("model") / "hf"),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=24,
    )
    Path(path, "tokenizer.model").write_bytes(b"a tokenizer")
    Path(path, "chat_template.jinja").write_text("a template")
    return Path(path)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def whole_model(model: Path) -> float:
    """MiB of all its weights."""
    return sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**20


def memory(output: str) -> tuple[float, float]:
    """(weights, peak above the start), MiB of the largest rank."""
    found = re.search(r"memory +([\d.]+) MiB of weights a rank, peak ([\d.]+) MiB above", output)
    assert found is not None, output
    return float(found[1]), float(found[2])


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    """The model in Megatron's format, verified."""
    target = model.parent / "megatron"
    done = run([*TOOL, "hf-to-megatron", str(model), str(target), *TP2])
    assert done.returncode == 0, done.stderr
    assert "equal: largest difference of the logits" in done.stdout
    weights, peak = memory(done.stdout)
    assert weights < 0.51 * whole_model(model)
    assert peak < weights + ROOM * whole_model(model), "a rank holds a second model"
    return target


def test_there_and_back(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "hf"
    small = ["--max-shard-size", "10MB"]
    done = run([*TOOL, "megatron-to-hf", str(checkpoint), str(target), *PP2, *small])
    assert done.returncode == 0, done.stderr
    assert "equal: largest difference of the logits" in done.stdout
    weights, peak = memory(done.stdout)
    files = 2 * 10  # the one being filled and the one being written
    assert peak < weights + files + ROOM * whole_model(model), "a rank holds a second model"
    found = {n: t for p in target.glob("*.safetensors") for n, t in load_file(p).items()}
    expected = load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    sizes = [p.stat().st_size for p in target.glob("*.safetensors")]
    assert len(sizes) > 5
    assert max(sizes) < 10e6
    for name in ("tokenizer.model", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()
    assert [p.name for p in target.parent.iterdir()] == ["hf"]


def test_training_from_converted_weights(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """--load takes the weights of the converted checkpoint; a run's own checkpoint converts back.

    With a learning rate of 0 both stay what they were, while --hf-model holds zeros.
    """
    other = tmp_path / "other"
    shutil.copytree(model, other)
    expected = load_file(model / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    save_file(zeros, other / "model.safetensors", {"format": "pt"})
    replay = make_replay(str(tmp_path / "r.jsonl"), [3] * 4)
    done = torchrun(
        2, "examples/pretrain_phf.sh", "--hf-model", str(other), "--rollout-engine", "replay",
        "--replay-file", replay, "--global-batch-size", "4", "--train-iters", "1", "--lr", "0",
        "--max-prompt-length", "32", "--max-teacher-prompt-length", "32", "--dtype", "fp32", *PP2,
        "--load", str(checkpoint), "--save", str(tmp_path / "run"), "--no-tensorboard",
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "converted weights, starting before step 1" in done.stdout
    target = tmp_path / "hf"
    done = run([*TOOL, "megatron-to-hf", str(tmp_path / "run"), str(target), *TP2])
    assert done.returncode == 0, done.stderr
    found = load_file(target / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_failed_verification_keeps_nothing(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    done = run([*TOOL, "megatron-to-hf", str(checkpoint), str(target), "--tolerance", "0"])
    assert done.returncode == 2
    fails_once(done, "verification failed, nothing was kept: DIFFERENT: largest difference")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ["hf-to-megatron", "megatron-to-hf"])
def test_full_disk(model: Path, checkpoint: Path, tmp_path: Path, action: str) -> None:
    """No file may exceed 20 MB: the old target stays, nothing else is left."""
    target = tmp_path / "target"
    shutil.copytree(model, target)
    (target / "model.safetensors").write_bytes(b"old")
    before = contents(tmp_path)
    source = model if action == "hf-to-megatron" else checkpoint
    command = [*TOOL, action, str(source), str(target), "--overwrite", "--no-verify"]
    done = run(["bash", "-c", f"ulimit -f 20000; exec {' '.join(command)}"])
    assert done.returncode == 2
    fails_once(done, "cannot be written (")
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_damaged_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    data = next((broken / "release").glob("__1_*.distcp"))
    data.write_bytes(data.read_bytes()[: -(2**20)])
    done = run([*TOOL, "megatron-to-hf", str(broken), str(tmp_path / "hf"), "--no-verify"])
    assert done.returncode == 2
    fails_once(done, f"{data.name}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def damaged(model: Path, path: Path, file: str, change) -> str:
    shutil.copytree(model, path)
    change(path / file)
    return str(path)


def test_what_is_refused_before_anything_starts(
    model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    cut = damaged(
        model, tmp_path / "a", "model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1])
    )
    other = damaged(
        model, tmp_path / "b", "config.json", lambda p: p.write_text('{"model_type": "gpt2"}')
    )
    no_config = str(tmp_path / "c")
    shutil.copytree(checkpoint, no_config)
    shutil.rmtree(tmp_path / "c" / "release" / "hf")
    there = str(tmp_path / "a")
    new = str(tmp_path / "new")
    to_megatron, to_hf = [*TOOL, "hf-to-megatron"], [*TOOL, "megatron-to-hf"]
    mistakes = [
        ([*to_megatron, cut, new], "bytes, but its header describes"),
        ([*to_megatron, other, new], "model_type 'gpt2' is not supported"),
        ([*to_megatron, "/nowhere", new], "/nowhere: no such directory"),
        ([*to_megatron, str(model), there], "is there already; pass --overwrite"),
        ([*to_megatron, str(model), new, *TP2[:1], "5"], "does not divide the model's 768 MLP"),
        ([*to_megatron, str(model), new, *PP2[:1], "5"], "does not divide the model's 24 layers"),
        ([*to_hf, str(model), new], "no Megatron checkpoint"),
        ([*to_hf, no_config, new], "is missing; copy the checkpoint again"),
        ([*to_hf, str(checkpoint), new, "--max-shard-size", "5"], "write it as 5GB"),
    ]
    for command, message in mistakes:
        done = run(command, timeout=300)
        assert done.returncode == 2
        fails_once(done, message)
        assert not Path(new).exists()
        assert done.stderr.count("\n") == 1
    assert json.loads(Path(there, "config.json").read_text())["model_type"] == "qwen3"
