"""The embedded task: chains of single-digit additions and subtractions modulo 10.

A problem like ``3+4-9`` has the worked solution ``3+4=7;7-9=8;\\boxed{8}``.  Everything, the
tiny model and its tokenizer too, is made on the spot from a seed.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptTemplates

ARITHMETIC_TEMPLATES = PromptTemplates(student="{problem}=", teacher="{problem}|{solution}=")
OPERATIONS = 5
_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
_SYMBOLS = (*"0123456789+-;=|}", "\\boxed{")
_VOCAB_SIZE = 32
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _is_held_out(text: str) -> bool:
    """A problem's own text decides its split, so that no seed can mix them."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def _solve(first: int, steps: list[tuple[str, int]]) -> tuple[str, int]:
    """The worked solution, one step after the other, and the final value."""
    value, lines = first, ""
    for sign, digit in steps:
        result = (value + digit if sign == "+" else value - digit) % 10
        lines += f"{value}{sign}{digit}={result};"
        value = result
    return f"{lines}\\boxed{{{value}}}", value


def make_problems(split: str, count: int, seed: int, operations: int = OPERATIONS) -> list[Problem]:
    """``count`` different problems of ``train`` or ``heldout``; the same for the same seed."""
    assert split in ("train", "heldout"), split
    generator = random.Random(f"{split} {seed} {operations}")
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        first = generator.randrange(10)
        steps = [(generator.choice("+-"), generator.randrange(10)) for _ in range(operations)]
        text = str(first) + "".join(f"{sign}{digit}" for sign, digit in steps)
        if text in seen or _is_held_out(text) != (split == "heldout"):
            continue
        seen.add(text)
        solution, answer = _solve(first, steps)
        problems.append(Problem(text, solution, str(answer), len(problems)))
    return problems


def make_tokenizer():  # type: ignore[no-untyped-def]  # PreTrainedTokenizerFast, imported late
    """One token a character, ``\\boxed{`` and the chat marks; vocabulary of 32."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*_SPECIAL, *_SYMBOLS]
    tokens += [f"<|unused{i}|>" for i in range(_VOCAB_SIZE - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        additional_special_tokens=list(_SPECIAL[2:]),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# config.json of the embedded task's model; also what the checks before launch read.
MODEL_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "qwen3",
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
)


def make_hf_directory(path: str, seed: int) -> None:
    """A complete HuggingFace directory of a tiny Qwen3 model with random weights."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = {k: v for k, v in MODEL_CONFIG.items() if k != "model_type"}
    config = Qwen3Config(**settings, **ids, bos_token_id=None)
    disable_progress_bar()  # one file of a megabyte
    os.makedirs(path, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
