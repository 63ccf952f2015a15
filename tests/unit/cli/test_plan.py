"""The planner: no torch, layouts that divide the model, formulas where a hand can check them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megatron_phf.cli import plan
from megatron_phf.config.settings import Config
from megatron_phf.estimate.memory import Machine, peak_estimate, phase_estimates
from megatron_phf.model.architecture import parse_architecture
from megatron_phf.teacher.architecture import Models
from tests.launch import REPO

_COMMON = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
}


def dense(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> dict:
    return {
        **_COMMON,
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


def mixture(layers: int, hidden: int, heads: int, expert: int) -> dict:
    return {
        **dense(layers, hidden, 3 * hidden, heads, False),
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert,
        "norm_topk_prob": True,
    }


# name -> (config.json, billions of parameters, GPUs)
MODELS = {
    "1.7B": (dense(28, 2048, 6144, 16, True), 1.72, 8),
    "8B": (dense(36, 4096, 12288, 32, False), 8.2, 8),
    "32B": (dense(64, 5120, 25600, 64, False), 32.8, 64),
    "30B-A3B": (mixture(48, 2048, 32, 768), 30.5, 64),
    "235B-A22B": (mixture(94, 4096, 64, 1536), 235.1, 1024),
}


HARDWARE = plan.Hardware(4e14, 3e11, 4e10, 8, 2.5e12, 3e-4)


@pytest.mark.parametrize("name", MODELS)
def test_layouts_fit_and_divide(name: str) -> None:
    content, billions, gpus = MODELS[name]
    arch = parse_architecture(content, name)
    assert arch.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    base = Config().replaced(global_batch_size=256)
    fit, rest = plan.plans(arch, base, gpus, 74.5, HARDWARE)
    assert fit
    assert [p.seconds for p in fit] == sorted(p.seconds for p in fit)
    for p in (*fit, *rest):
        sizes = p.config.parallel
        split = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
        assert split * p.replicas == gpus
        assert (p.total <= 74.5) == (p in fit)
    # Splitting the model more never takes more weights; recompute never more activations.
    by_name = {p.describe(): p.memory for p in (*fit, *rest)}
    for text, memory in by_name.items():
        again = by_name.get(f"{text} recompute")
        if again is not None:
            assert sum(again.values()) <= sum(memory.values())


def test_parts_by_hand() -> None:
    """Qwen3-1.7B on one GPU: every weight here, bf16 with fp32 gradients and three fp32 states."""
    arch = parse_architecture(MODELS["1.7B"][0], "1.7B")
    models, machine = Models(arch), Machine(2, 1)
    phases = phase_estimates(models, Config(), machine, 1536, 0)
    n = arch.num_parameters() / 2**30
    for name, size in {"weights": 2, "gradients": 4, "optimizer": 12, "teacher": 2}.items():
        assert phases["student"][name] == pytest.approx(size * n)
        assert phases["teacher"][name] == pytest.approx(size * n)
    # torch's Adam makes a root of every second moment: more here than activations and loss.
    parts = peak_estimate(models, Config(), machine, 1536)
    assert parts == phases["optimizer"]
    assert parts["optimizer"] == pytest.approx(16 * n)


def test_rollout_time_by_hand() -> None:
    """8B on one GPU: 8.19 B weights of 2 bytes a token at 2.5 TB/s; a batch of half the rows."""
    arch = parse_architecture(MODELS["8B"][0], "8B")
    config = Config().replaced(global_batch_size=64, rollout_batch_size=32, max_new_tokens=100)
    fast = dataclasses.replace(HARDWARE, launch=0.0)
    token = arch.num_parameters() * 2 / 2.5e12
    assert plan.rollout_seconds(arch, config, 1, fast) == pytest.approx(2 * 100 * token)
    # Two replicas have one batch each; launches of 36 layers take longer than the weights.
    assert plan.rollout_seconds(arch, config, 2, HARDWARE) == pytest.approx(100 * 36 * 3e-4)


def test_command_line_without_torch(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["8B"][0]))
    command = [sys.executable, "tools/plan.py", "--hf-config", str(path), "--gpus", "8"]
    blocked = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; import runpy; "
    blocked += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked, *command[1:]],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8.2 B parameters, 8 GPUs" in done.stdout
    assert "TP" in done.stdout
    bad = subprocess.run(
        [*command[:-1], "0"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stderr) == (2, "error: --gpus: need more than 0\n")


def test_a_preset_is_its_flags(tmp_path, capsys) -> None:
    """And what is given beside it wins; a word that is no number, or no preset, is one error."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["1.7B"][0]))

    def shown(*words: str) -> str:
        assert plan.main(["--hf-config", str(path), "--gpus", "8", *words]) == 0
        return capsys.readouterr().out

    by_hand = shown("--teacher", "ema", "--lora-rank", "64", "--lora-dropout", "0.05")
    assert shown("--preset", "phf") == by_hand != shown()
    assert shown("--preset", "phf", "--lora-rank", "0", "--teacher", "frozen") == shown()
    for words, message in (
        (["--preset", "phg"], "error: --preset phg: no such preset; choose one of opsd,"),
        (["--global-batch-size", "x"], "error: argument --global-batch-size: invalid int value"),
        (["--global-batch-size", "0"], "error: --global-batch-size 0: need at least 1"),
        (["--max-new-tokens", "0"], "error: --max-new-tokens 0: need at least 1"),
        (["--network-gbytes", "0"], "error: --network-gbytes: need more than 0"),
    ):
        assert plan.main(["--hf-config", str(path), "--gpus", "8", *words]) == 2
        assert capsys.readouterr().err.startswith(message)
