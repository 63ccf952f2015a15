"""The models and files that the acceptance starts from: a few layers for parity, a large one.

``python -m megatron_phf.cli.accept.model DIRECTORY`` writes the large one, which is measured, in a
process of its own, whose memory on the device goes with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Qwen3-1.7B; beside a CPU, one that takes no time.
LARGE = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_COMMON = {
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


def large_settings(cuda: bool) -> dict:
    """Of the configuration of the model that is measured."""
    return {**(LARGE if cuda else SMALL), **_COMMON}


def write_large(directory: str, cuda: bool) -> None:
    """Random weights, in bf16 on a GPU, where drawing them takes no time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_phf.demo.task import make_tokenizer

    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**large_settings(cuda), **ids, bos_token_id=None, rope_parameters=rope)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_tiny(directory: str) -> None:
    """A random model and rollouts for parity; another with a tokenizer, problems and templates."""
    from megatron_phf.demo.task import make_hf_directory, make_problems
    from megatron_phf.reference.tiny import make_model, make_replay

    os.makedirs(directory)
    make_model(os.path.join(directory, "model"))
    make_replay(os.path.join(directory, "replay.jsonl"), [1, 12, 31, 5])
    make_hf_directory(os.path.join(directory, "trained"), seed=1)
    with open(os.path.join(directory, "problems.jsonl"), "w", encoding="utf-8") as f:
        for p in make_problems("train", 64, seed=1):
            f.write(json.dumps({"problem": p.problem, "solution": p.solution}) + "\n")
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        Path(directory, f"{side}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from megatron_phf.runtime import device

    write_large(sys.argv[1], device.has_cuda())
    Path(sys.argv[1] + ".json").write_text("{}", encoding="utf-8")  # what the others leave, too
