"""The tokenizer of a HuggingFace model directory, and the tokens that end a rollout."""

from __future__ import annotations

import json
import os
from typing import Any


def load_tokenizer(path: str) -> Any:
    """The tokenizer in ``path``; no code from there is run and nothing is downloaded.

    Raises:
        ValueError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, by file and format
        raise ValueError(
            f"--hf-model {path}: its tokenizer does not load ({type(error).__name__}: {error})"
        ) from error


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
        try:
            with open(path, encoding="utf-8") as f:
                more = json.load(f).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({error}); copy the model again") from error
        ids |= set(more if isinstance(more, list) else [] if more is None else [more])
    if not ids:
        raise ValueError(f"--hf-model {directory}: its tokenizer names no end-of-sequence token")
    return tuple(sorted(ids))
