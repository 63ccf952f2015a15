"""The models and files that the acceptance starts from: of a few layers, and large ones.

``python -m megatron_phf.cli.accept.model DIRECTORY [8B]`` writes a large one, random, in a process
of its own, whose memory on the device goes with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
# Qwen3's; beside a CPU one that takes no time.
SIZES = {
    "1.7B": (151936, 2048, 6144, 28, 16, 8, 128, True),
    "8B": (151936, 4096, 12288, 36, 32, 8, 128, False),
    "small": (512, 64, 128, 2, 4, 2, 16, True),
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def settings_of(size: str) -> dict:
    """Of a configuration."""
    common = {"max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-6}
    return {**dict(zip(_NAMES, SIZES[size], strict=True)), **common}


def write_large(directory: str, size: str) -> None:
    """Random weights, in bf16 on a GPU, where drawing them takes no time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_phf.demo.task import make_tokenizer

    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**settings_of(size), **ids, bos_token_id=None, rope_parameters=rope)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float32 if size == "small" else torch.bfloat16)
    with torch.device("cpu" if size == "small" else "cuda"):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_tiny(directory: str) -> None:
    """Random models and rollouts for parity; others with a tokenizer, problems and templates."""
    from megatron_phf.demo.task import make_hf_directory, make_problems, make_tokenizer
    from megatron_phf.reference.tiny import make_model, make_replay

    make_hf_directory(os.path.join(directory, "trained"), seed=1)
    make_model(os.path.join(directory, "model"))
    make_model(os.path.join(directory, "experts"), "qwen3_moe", norm_topk_prob=True, **_EXPERTS)
    make_replay(os.path.join(directory, "replay.jsonl"), [1, 12, 31, 5])
    served = os.path.join(directory, "served")  # heads as wide as vLLM's kernels take
    make_model(served, vocab_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    make_tokenizer().save_pretrained(served)
    with open(os.path.join(directory, "problems.jsonl"), "w", encoding="utf-8") as f:
        for p in make_problems("train", 64, seed=1):
            f.write(json.dumps({"problem": p.problem, "solution": p.solution}) + "\n")
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        Path(directory, f"{side}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from megatron_phf.runtime import device

    chosen = sys.argv[2] if len(sys.argv) > 2 else "1.7B" if device.has_cuda() else "small"
    write_large(sys.argv[1], chosen)
    Path(sys.argv[1] + ".json").write_text("{}", encoding="utf-8")  # what the others leave, too
