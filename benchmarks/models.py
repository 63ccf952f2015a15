"""Random models of a given shape, as HuggingFace directories and in both implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_qwen3(path: Path, **settings: Any) -> str:
    """Write a random Qwen3 of ``settings`` over the benchmarks' usual shape; its directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    values = {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **settings,
    }
    Qwen3ForCausalLM(Qwen3Config(**values)).save_pretrained(path)
    return str(path)


def load_peer(directory: str, dtype: torch.dtype) -> Any:
    """transformers' model, with the fused attention it takes by default."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def job_config(directory: str, *argv: str) -> Any:
    """The product's configuration for the model in ``directory``."""
    from megatron_phf.config.flags import parse_args

    return parse_args(["--hf-model", directory, "--data", "unused", *argv])
