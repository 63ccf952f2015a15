"""Tiny random HuggingFace models and replay files for the tests."""

from __future__ import annotations

import math
import random

import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_phf.demo.task import make_tokenizer
from megatron_phf.reference import tiny
from megatron_phf.reference.tiny import make_replay as make_replay

ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def make_model(path: str, *args, tokenizer: bool = True, **settings) -> str:
    """As ``tiny.make_model``, with the embedded task's tokenizer, unless told otherwise."""
    tiny.make_model(path, *args, **settings)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return path


def make_adapter(
    path: str, model: str, rank: int = 8, alpha: int = 12, targets: str = ALL_LINEARS
) -> str:
    """Write a peft adapter for the model directory, lora_B random too; returns ``path``."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets.split(","), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    adapted.save_pretrained(path)
    return path


def make_answering_model(path: str, right: float) -> str:
    """A model of the embedded task that answers ``\\boxed{7}`` with probability ``right``, else

    ``\\boxed{3}``.
    """
    follows = {
        "<|assistant|>": {"\\boxed{": 1.0}, "\\boxed{": {"7": right, "3": 1 - right},
        "7": {"}": 1.0}, "3": {"}": 1.0}, "}": {"<|end|>": 1.0},
    }  # fmt: skip
    return make_following_model(path, follows)


def make_following_model(
    path: str, follows: dict[str, dict[str, float]], noise: float = 0.0, rest: float = -40.0
) -> str:
    """A model of the embedded task: after each token of ``follows`` the next ones' probabilities.

    ``rest``: the logit of every other token.  Layers add nothing, so that each token's logits
    depend on the last one alone, or add a little of everything before (``noise``: their weights).
    """
    from megatron_phf.demo.task import make_hf_directory, make_tokenizer

    make_hf_directory(path, seed=1)
    ids = make_tokenizer().get_vocab()
    config = Qwen3Config.from_pretrained(path, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
            if noise and p.dim() > 1:
                p.normal_(0, noise)
        model.model.embed_tokens.weight.copy_(torch.eye(32, config.hidden_size))
        logits = torch.full((32, 32), rest)  # [next, last]
        for last, nexts in follows.items():
            for token, probability in nexts.items():
                logits[ids[token], ids[last]] = math.log(probability)
        # The final norm scales a unit vector by the root of its length.
        model.lm_head.weight[:, :32] = logits / math.sqrt(config.hidden_size)
    model.save_pretrained(path)
    return path


def make_sentencepiece(path: str, vocab_size: int, **settings) -> str:
    """Train a SentencePiece model on a few kilobytes of sums in words; returns ``path``."""
    generator = random.Random(5)
    words = "The answer of this problem is an and so we add né numbers to get".split()  # noqa: SIM905
    lines = [
        " ".join([*generator.sample(words, 6), f"{generator.randrange(99)} + {i}, = {i * 7}."])
        for i in range(200)
    ]
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=f,
            vocab_size=vocab_size,
            byte_fallback=True,
            minloglevel=2,
            **settings,
        )
    return path
