"""The tokenizer of a HuggingFace model directory, and the tokens that end a rollout."""

from __future__ import annotations

import os
from typing import Any

from megatron_phf.data.hf_files import read_json_object


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``path``; nothing is downloaded, and no code from there is run unless told.

    Raises:
        ValueError: it is missing or damaged, or needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds, by file and format
        reason = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in reason:
            reason = "it is Python code; read it, and allow it with --trust-remote-code"
        raise ValueError(f"--hf-model {path}: its tokenizer does not load ({reason})") from error


def check_token_ids(largest: int, vocab_size: int) -> None:
    """Raise ValueError where the tokenizer gives ids that the model has no embedding for."""
    if largest >= vocab_size:
        raise ValueError(
            f"--hf-model: its tokenizer gives token id {largest}, but the model's vocabulary is "
            f"0 to {vocab_size} - 1; tokenizer and weights are of different models"
        )


def stop_token_ids(tokenizer: Any, directory: str | None) -> tuple[int, ...]:
    """Ids that end a rollout: the tokenizer's EOS and those of ``generation_config.json``.

    Raises:
        ValueError: there are none, or that file is damaged.
    """
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    path = os.path.join(directory or "", "generation_config.json")
    if directory is not None and os.path.isfile(path):
        more = read_json_object(path).get("eos_token_id")
        given = more if isinstance(more, list) else [] if more is None else [more]
        if not all(type(i) is int and 0 <= i < 2**31 for i in given):
            raise ValueError(f"{path}: eos_token_id is no token id; copy the model again")
        ids |= set(given)
    if not ids:
        raise ValueError(f"--hf-model {directory}: its tokenizer names no end-of-sequence token")
    return tuple(sorted(ids))
