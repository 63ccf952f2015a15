"""HuggingFace -> Megatron -> HuggingFace in other layouts: the same bits, dtype by dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_phf.cli.check_export import largest_difference
from tests.launch import torchrun
from tests.models import make_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
}  # fmt: skip


def shape(
    hidden: int, heads: int, groups: int, head: int, ffn: int, tied: bool, **more: object
) -> dict:
    return {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups,
        "head_dim": head, "intermediate_size": ffn, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


# Published models, their hidden size scaled down and all ratios kept; 4 layers, vocabulary 250.
MODELS = {
    "Qwen3-0.6B": ("qwen3", shape(64, 8, 4, 16, 192, True)),
    "Qwen3-1.7B": ("qwen3", shape(64, 8, 4, 8, 192, True)),
    "Qwen3-4B": ("qwen3", shape(80, 8, 2, 16, 304, True)),
    "Qwen3-8B": ("qwen3", shape(64, 8, 2, 8, 192, False)),
    "Qwen2.5-0.5B": ("qwen2", shape(56, 14, 2, 4, 304, True)),
    "Qwen2.5-7B": ("qwen2", shape(56, 14, 2, 4, 296, False)),
    "Llama-3.2-1B": ("llama", shape(64, 8, 2, 8, 256, True, rope_parameters=LLAMA3)),
    "Llama-2-7B": ("llama", shape(64, 8, 8, 8, 172, False)),
    "Qwen3-30B-A3B": ("qwen3_moe", shape(64, 16, 2, 16, 192, False, **EXPERTS)),
    "SmolLM2-135M": ("llama", shape(72, 9, 3, 8, 192, True)),  # zero heads at TP 2
}
# Rotary embeddings that 16 tokens see, each with its logits: as transformers 4 and 5 write them.
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    "llama3": {**LLAMA3, "low_freq_factor": 2.0, "original_max_position_embeddings": 32},
}
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2_pp2": (2, 2), "one": (1, 1)}
PROBED = "SmolLM2-135M"


class Jobs:
    """Job files for ranks of ``megatron_phf.cli.convert``, by their number."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._paths = directory, {1: [], 2: [], 4: []}

    def add(self, action: str, layout: str, source: str, target: str, **more: object) -> None:
        tp, pp = LAYOUTS[layout]
        to_megatron = action == "hf-to-megatron"
        job = {
            "action": action,
            "source": str(self._directory / source),
            "target": str(self._directory / target),
            "hf_model": str(self._directory / (source if to_megatron else source + "/hf")),
            "dtype": "fp32" if to_megatron else None,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "max_shard_bytes": 300_000,
            "probe": None,
            **more,
        }
        paths = self._paths[tp * pp]
        paths.append(self._directory / f"job{tp * pp}_{len(paths)}.json")
        paths[-1].write_text(json.dumps(job))

    def launch(self, processes: int) -> None:
        paths = [str(path) for path in self._paths[processes]]
        done = torchrun(processes, "-m", "megatron_phf.cli.convert", *paths, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conversion")
    jobs = Jobs(directory)
    for name, (architecture, settings) in MODELS.items():
        make_model(str(directory / name), architecture, **settings)
        jobs.add("hf-to-megatron", "tp2_pp2", name, f"{name}-tp2_pp2")
        jobs.add("hf-to-megatron", "tp2", name, f"{name}-tp2")
        jobs.add("megatron-to-hf", "pp2", f"{name}-tp2/release", f"{name}-tp2-pp2.hf")
        jobs.add("megatron-to-hf", "tp2", f"{name}-tp2_pp2/release", f"{name}-tp2_pp2-tp2.hf")
        jobs.add("megatron-to-hf", "one", f"{name}-tp2_pp2/release", f"{name}-tp2_pp2-one.hf")
    # bf16 in, bf16 kept, and an export that is rounded on the way; with the logits of each.
    bf16 = {"dtype": "bf16", "probe": str(directory / "to_megatron.probe")}
    jobs.add("hf-to-megatron", "tp2", PROBED, "bf16", **bf16)
    to_hf = {"probe": str(directory / "to_hf.probe")}
    jobs.add("megatron-to-hf", "pp2", "bf16/release", "bf16.hf", **to_hf)
    rounded = {"dtype": "bf16", "probe": str(directory / "rounded.probe")}
    jobs.add("megatron-to-hf", "pp2", f"{PROBED}-tp2/release", "rounded.hf", **rounded)
    for name, rope in ROPES.items():
        make_model(str(directory / name), "llama", rope_parameters=rope)
        path = directory / name / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "rope_scaling": content.pop("rope_parameters")}))
        probe = {"probe": str(directory / f"{name}.probe")}
        jobs.add("hf-to-megatron", "one", name, f"{name}-one", **probe)
    for processes in (4, 2, 1):
        jobs.launch(processes)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, the sharded files' index checked along the way."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = {path.name: load_file(path) for path in files}
    index = directory / "model.safetensors.index.json"
    if len(files) > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"] == {n: f for f, part in tensors.items() for n in part}
        total = sum(t.nbytes for part in tensors.values() for t in part.values())
        assert content["metadata"]["total_size"] == total
        largest = max(t.nbytes for part in tensors.values() for t in part.values())
        assert all(p.stat().st_size < max(300_000, largest) + 10_000 for p in files)
    else:
        assert not index.exists()
    return {name: tensor for part in tensors.values() for name, tensor in part.items()}


def same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("route", ["tp2-pp2", "tp2_pp2-tp2", "tp2_pp2-one"])
def test_round_trip(converted: Path, model: str, route: str) -> None:
    back = converted / f"{model}-{route}.hf"
    same_bits(weights(back), weights(converted / model))
    config, source = (
        json.loads((d / "config.json").read_text()) for d in (back, converted / model)
    )
    assert config == source
    assert config["vocab_size"] == 250  # padded to 256 in the checkpoint at TP 2


def test_dtypes(converted: Path) -> None:
    expected = {n: t.bfloat16() for n, t in weights(converted / PROBED).items()}
    for name in ("bf16.hf", "rounded.hf"):
        same_bits(weights(converted / name), expected)
        assert json.loads((converted / name / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("model", "probe"),
    [(PROBED, "to_megatron"), ("bf16.hf", "to_hf"), ("rounded.hf", "rounded")],
)
def test_logits(converted: Path, model: str, probe: str) -> None:
    """What ``--verify`` compares: Megatron's logits at TP 2 or PP 2, and transformers'."""
    path = str(converted / f"{probe}.probe")
    difference, deviation = largest_difference(str(converted / model), path, "bfloat16")
    assert difference < 1e-5 * deviation
    if model == PROBED:  # the rounding is seen
        assert largest_difference(str(converted / model), path)[0] > 1e-4 * deviation


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(converted: Path, name: str) -> None:
    """rope_theta inside rope_scaling, and numbers that megatron-core does not have itself."""
    path = str(converted / f"{name}.probe")
    difference, deviation = largest_difference(str(converted / name), path)
    assert difference < 1e-5 * deviation
    config = converted / name / "config.json"
    content = json.loads(config.read_text())
    plain = {"rope_type": "default", "rope_theta": content["rope_scaling"]["rope_theta"]}
    config.write_text(json.dumps({**content, "rope_scaling": plain}))
    assert largest_difference(str(converted / name), path)[0] > 1e-2 * deviation  # it is seen
