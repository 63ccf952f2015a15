"""The recipes for H100s: what they start, and whether a model of that shape passes all checks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_phf.cli import preflight
from megatron_phf.config.flags import departures, parse_args
from megatron_phf.config.settings import Config
from megatron_phf.demo.task import make_tokenizer
from megatron_phf.model.architecture import read_architecture
from tests.launch import REPO

RECIPES = REPO / "examples" / "h100"
FP8 = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--first-last-layers-bf16"]
# hidden, MLP, layers, heads, key/value heads of each published config.json
SHAPES = {
    "1.7b": (2048, 6144, 28, 16, 8),
    "4b": (2560, 9728, 36, 32, 8),
    "8b": (4096, 12288, 36, 32, 8),
    "32b": (5120, 25600, 64, 64, 8),
    "30b_a3b": (2048, 6144, 48, 32, 4),
}
PARAMETERS = {"1.7b": 1.72, "4b": 4.02, "8b": 8.19, "32b": 32.8, "30b_a3b": 30.5}  # in 10^9
WORLD = {"32b": 32}


def write_model(directory: Path, name: str) -> Path:
    hidden, ffn, layers, heads, groups = SHAPES[name]
    experts = {
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }  # fmt: skip
    config = {
        "model_type": "qwen3_moe" if "a3b" in name else "qwen3",
        "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": name in ("1.7b", "4b"),
        "attention_bias": False, **(experts if "a3b" in name else {}),
    }  # fmt: skip
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(directory / "model")
    data = {"problem": "1+1", "solution": "2"}
    (directory / "data.jsonl").write_text(json.dumps(data) + "\n")
    return directory


def started(script: str, directory: Path, *more: str, **environment: str) -> list[str]:
    """The words after torchrun, run for real in bash."""
    stub = directory / "torchrun"
    stub.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    stub.chmod(0o755)
    path = f"{directory}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(RECIPES / script), str(directory / "model"), str(directory / "data.jsonl"),
         *more],
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": "here", **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def configuration(words: list[str]) -> Config:
    return parse_args(words[words.index(str(REPO / "examples" / "pretrain_phf.sh")) + 1 :])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_passes_all_checks(
    name: str, fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of the weight files, which are not there."""
    monkeypatch.syspath_prepend(str(REPO / "tests" / "fake_te"))
    importlib.invalidate_caches()
    monkeypatch.setattr(preflight, "_check_weights", lambda models, config: None)
    nodes = {"NODE_RANK": "1", "HEAD_NODE": "node0"} if name in WORLD else {}
    words = started(f"qwen3_{name}.sh", write_model(tmp_path, name), *(FP8 if fp8 else []), **nodes)
    config, world = configuration(words), WORLD.get(name, 8)
    processes = int(words[words.index("--nproc-per-node") + 1])
    count = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    assert processes * count == world
    preflight.check(config)
    preflight.check_world_size(config, world)
    arch = read_architecture(str(tmp_path / "model"))
    assert arch.num_parameters() / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)
    train, method, rollout = config.train, config.method, config.rollout
    published = (100, 32, 5e-6, "cosine", 0.1)
    assert published == (train.train_iters, train.global_batch_size, train.lr,
                         train.lr_decay_style, train.clip_grad)  # fmt: skip
    assert train.lr_decay_iters == 27594  # so that 100 steps of the cosine are flat
    assert (method.teacher, method.ema_decay, method.phf_alpha) == ("ema", 0.999, 0.05)
    assert (rollout.rollout_temperature, rollout.rollout_top_p, rollout.rollout_top_k) == (
        1.1, 0.95, 20)  # fmt: skip
    if name in ("1.7b", "4b", "8b"):
        assert (config.lora.lora_rank, config.lora.lora_alpha) == (64, 128)
        assert method.opsd_clip == (0.06 if name == "8b" else 0.05)
        assert departures(config) == []


def test_every_recipe_is_tested() -> None:
    recipes = {path.stem.removeprefix("qwen3_") for path in RECIPES.glob("qwen3_*.sh")}
    assert recipes == set(SHAPES)


def test_a_recipe_says_what_it_needs() -> None:
    done = subprocess.run(
        ["bash", str(RECIPES / "qwen3_8b.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "path/to/model problems.jsonl" in done.stderr
