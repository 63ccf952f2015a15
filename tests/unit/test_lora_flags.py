"""LoRA's flags: what is refused before launch, and the configuration that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_phf import preflight
from megatron_phf.config import Config
from megatron_phf.model.adapter_config import adapter_config, num_adapter_parameters
from megatron_phf.model.adapter_io import merge_adapter
from megatron_phf.model.architecture import read_architecture
from tests.models import make_adapter, make_model

REAL = "--hf-model MODEL --data DATA --max-new-tokens 64 --max-prompt-length 64 "
REAL += "--max-teacher-prompt-length 128 --lora-rank 4 "
MISTAKES = {
    "--lora-rank -1": "--lora-rank -1: need at least 0",
    "--lora-rank 4": "--lora-rank needs --hf-model",
    "--lora-adapter ADAPTER": "--lora-adapter needs --lora-rank",
    "--save-adapter out": "--save-adapter needs --lora-rank",
    REAL + "--lora-alpha 0": "--lora-alpha 0.0: need above 0",
    REAL + "--lora-dropout 1": "--lora-dropout 1.0: need 0 to below 1",
    REAL + "--lora-target-modules q_proj,lm_head": "'lm_head' is not one of q_proj,k_proj",
    REAL + "--lora-target-modules q_proj,": "'' is not one of",
    REAL + "--teacher-offload": "with --lora-rank the teacher shares the student's weights",
    REAL + "--lora-adapter MODEL": "adapter_config.json: cannot be read",
    REAL + "--lora-adapter DAMAGED": "adapter_config.json: is not JSON",
    REAL + "--lora-adapter DORA": "adapter_config.json: use_dora: only plain LoRA",
    REAL + "--lora-adapter ADAPTER": (
        "pass --lora-rank 4 --lora-alpha 6 --lora-target-modules q_proj,up_proj"
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("lora")
    model = make_model(str(directory / "model"))
    adapter = make_adapter(str(directory / "adapter"), model, 4, 6, "q_proj,up_proj")
    config = Path(adapter, "adapter_config.json")
    for name, content in (
        ("damaged", "{"),
        ("dora", json.dumps({**json.loads(config.read_text()), "use_dora": True})),
    ):
        (directory / name).mkdir()
        (directory / name / "adapter_config.json").write_text(content)
    (directory / "data.jsonl").write_text('{"problem": "1+1?", "solution": "2"}\n')
    return {
        "MODEL": model,
        "ADAPTER": adapter,
        "DATA": str(directory / "data.jsonl"),
        "DAMAGED": str(directory / "damaged"),
        "DORA": str(directory / "dora"),
    }


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_refused_before_launch(command: str, files: dict[str, str], capsys) -> None:
    assert preflight.main([files.get(word, word) for word in command.split()]) == 2
    output = capsys.readouterr()
    assert MISTAKES[command] in output.err
    assert output.err.count("\n") == 1


def test_a_fitting_adapter_is_accepted(files: dict[str, str], capsys) -> None:
    more = "--lora-adapter ADAPTER --lora-alpha 6 --lora-target-modules up_proj,q_proj"
    assert preflight.main([files.get(word, word) for word in (REAL + more).split()]) == 0


def test_adapter_config_of_the_published_recipe() -> None:
    """The fields that vLLM checks, and the paper's numbers."""
    content = adapter_config(Config().replaced(hf_model="/models/base", lora_rank=64))
    assert (content["r"], content["lora_alpha"], content["bias"]) == (64, 128, "none")
    assert content["base_model_name_or_path"] == "/models/base"
    assert content["modules_to_save"] is None
    assert set(content["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_number_of_parameters_equals_pefts(files: dict[str, str]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(Path(files["ADAPTER"], "adapter_model.safetensors"))
    lora = Config().replaced(lora_rank=4, lora_target_modules="q_proj,up_proj").lora
    found = num_adapter_parameters(read_architecture(files["MODEL"]), lora)
    assert found == sum(t.numel() for t in tensors.values())


def test_merge_rounds_once() -> None:
    """In bf16, adding a product that was rounded first would give another weight."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((64, 48), (8, 48), (64, 8))
    )
    name = "model.layers.0.mlp.up_proj"
    adapter = {
        f"base_model.model.{name}.lora_A.weight": a,
        f"base_model.model.{name}.lora_B.weight": b,
    }
    other = ("model.norm.weight", torch.ones(48))
    merged = dict(merge_adapter([(f"{name}.weight", weight), other], adapter, 0.37))
    exact = weight.double() + 0.37 * (b.double() @ a.double())
    assert torch.equal(merged["model.norm.weight"], other[1])
    assert (merged[f"{name}.weight"] != exact.bfloat16()).double().mean() < 1e-3
    twice = weight + (0.37 * (b @ a)).bfloat16()
    assert (twice != exact.bfloat16()).double().mean() > 0.1
