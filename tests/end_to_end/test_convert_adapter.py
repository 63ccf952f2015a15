"""Adapters out of a checkpoint and into a model: equal to what peft computes and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.end_to_end.test_bad_input import fails_once
from tests.end_to_end.test_convert_tool import TOOL, TP2
from tests.launch import run
from tests.models import make_adapter, make_model, make_replay
from tests.parallel.cases import launch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, peft's ``adapter`` of it, and both as the checkpoint of a LoRA run at TP 2."""
    directory = tmp_path_factory.mktemp("adapter")
    model = make_model(str(directory / "model"))
    adapter = make_adapter(str(directory / "adapter"), model)
    replay = make_replay(str(directory / "replay.jsonl"), [3])
    lora = {"lora-rank": 8, "lora-alpha": 12, "lora-adapter": adapter}
    argv = [f"--{k}={v}" for k, v in lora.items()]
    argv += ["--hf-model", model, *TP2, "--dtype", "fp32", "--rollout-engine", "replay"]
    argv += ["--replay-file", replay, "--max-prompt-length", "32", "--global-batch-size", "4"]
    argv += ["--max-teacher-prompt-length", "32"]
    saved = directory / "run" / "iter_0000007"
    launch(2, [{"kind": "reshard", "name": "save", "argv": argv, "save": str(saved)}], directory)
    shutil.copytree(model, saved / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    config = {"model": {"hf_model": model}, "lora": {"lora_rank": 8, "lora_alpha": 12.0}}
    sizes = {p.name: {"bytes": p.stat().st_size} for p in saved.iterdir() if p.is_file()}
    manifest = {"format": 1, "config": config, "files": sizes}
    (saved / "checkpoint.json").write_text(json.dumps(manifest))
    (directory / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def test_adapter_to_peft(files: Path, tmp_path: Path) -> None:
    done = run([*TOOL, "adapter-to-peft", str(files / "run"), str(tmp_path / "out"), *TP2])
    assert done.returncode == 0, done.stderr
    assert "equal: largest difference of the logits" in done.stdout
    found, expected = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", files / "adapter")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "out")(input_ids=tokens).logits
        base = AutoModelForCausalLM.from_pretrained(files / "model")
        original = PeftModel.from_pretrained(base, files / "adapter")(input_ids=tokens).logits
    assert torch.equal(loaded, original)


@pytest.fixture(scope="module")
def merged_by_peft(files: Path) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    return PeftModel.from_pretrained(base, files / "adapter").merge_and_unload().state_dict()


@pytest.mark.parametrize("way", ["merge-adapter", "megatron-to-hf"])
def test_merged(files: Path, merged_by_peft: dict, tmp_path: Path, way: str) -> None:
    """Of the model and the adapter's directory, or of the run's checkpoint."""
    sources = ["model", "adapter"] if way == "merge-adapter" else ["run"]
    command = [*TOOL, way, *(str(files / s) for s in sources), str(tmp_path / "out")]
    done = run([*command, "--max-shard-size", "200KB"])
    assert done.returncode == 0, done.stderr
    assert "equal: largest difference of the logits" in done.stdout
    parts = [load_file(p) for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(parts) > 1
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    assert merged.keys() == merged_by_peft.keys() - {"lm_head.weight"}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, merged_by_peft[name], rtol=1e-6, atol=1e-7)
    start = load_file(files / "model" / "model.safetensors")
    changed = [name for name in start if not torch.equal(start[name], merged[name])]
    assert len(changed) == 4 * 7


def test_mistakes(files: Path, tmp_path: Path) -> None:
    other = make_model(str(tmp_path / "other"), hidden_size=48, num_hidden_layers=2)
    cut = tmp_path / "cut"
    shutil.copytree(files / "run", cut)
    data = next((cut / "iter_0000007").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-9])
    new, run_directory, adapter = (
        str(p) for p in (tmp_path / "n", files / "run", files / "adapter")
    )
    mistakes = [
        (
            ["merge-adapter", other, adapter, new, "--no-verify"],
            "against its adapter_config.json (target_modules) and this model",
        ),
        (["merge-adapter", other, other, new], "adapter_config.json: cannot be read"),
        (["adapter-to-peft", str(cut), new], f"{data.name}: has "),
        (["adapter-to-peft", run_directory, new, "--hf-model", "/none"], "pass --hf-model"),
    ]
    for command, message in mistakes:
        done = run([*TOOL, *command])
        assert done.returncode == 2
        fails_once(done, message)
        assert not Path(new).exists()
