"""Tiny random models and rollouts, made on the spot for a comparison."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def make_model(path: str, architecture: str = "qwen3", seed: int = 7, **settings: Any) -> str:
    """Write a model directory with random weights, norms and biases too; returns ``path``."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **settings,
    }
    config_class, model_class = _CLASSES[architecture]
    model = model_class(config_class(**values))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
            if name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(path)
    return path


def make_replay(
    path: str,
    response_lengths: list[int],
    vocab_size: int = 250,
    seed: int = 3,
    masked: bool = False,
    log_probs: bool = False,
) -> str:
    """Write random rollouts with prompts of uneven lengths; returns ``path``.

    ``masked``: two tokens of five are not the student's, and none of the first response is.
    ``log_probs``: of what sampled them, some way from those of any model.
    """
    generator, coin, dice = (random.Random(seed + i) for i in range(3))

    def ids(low: int, high: int) -> list[int]:
        return [generator.randrange(vocab_size) for _ in range(generator.randint(low, high))]

    with open(path, "w") as f:
        for i, n in enumerate(response_lengths):
            sample: dict[str, list] = {
                "student_prompt_ids": ids(1, 9),
                "teacher_prompt_ids": ids(4, 20),
                "response_ids": ids(n, n),
            }
            if masked:
                sample["response_mask"] = [int(i > 0 and coin.random() < 0.6) for _ in range(n)]
            if log_probs:
                sample["log_probs"] = [dice.uniform(-8.0, -4.0) for _ in range(n)]
            f.write(json.dumps(sample) + "\n")
    return path
