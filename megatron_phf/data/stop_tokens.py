"""Which tokens end a rollout, whether all have a row in the model, what the chat template does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.files.foreign import read_json_object


def check_token_ids(tokenizer: Tokenizer, stop_ids: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError where a token, added ones too, or a stop id has no row in the embedding."""
    largest = max(tokenizer.largest_id, *stop_ids)
    if largest >= vocab_size:
        files = "config.json or generation_config.json"
        what = "a tokenizer" if largest == tokenizer.largest_id else files
        raise ValueError(
            f"{tokenizer.source}: {what} with token ids up to {largest}, but the model's embedding "
            f"has {vocab_size} rows (ids 0 to {vocab_size - 1}); tokenizer and weights are of "
            "different models, or the embedding was not resized for added tokens"
        )


def _generation_stop_ids(directory: str) -> set[int]:
    """What ``generate`` of transformers stops at.

    ``generation_config.json`` alone decides where there is one, also by naming none; without it
    ``config.json`` does (``GenerationMixin.adjust_generation_fn``).
    """
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            break
    else:
        return set()
    found = read_json_object(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{path}: eos_token_id is no token id; copy the model again")
    return set(ids)


def stop_token_ids(tokenizer: Tokenizer, directory: str) -> tuple[int, ...]:
    """Ids that end a rollout: the tokenizer's EOS, and those that ``generate`` stops at.

    Raises:
        ValueError: there are none, or the file that names them is damaged.
    """
    ids = _generation_stop_ids(directory)
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    if not ids:
        raise ValueError(
            f"{tokenizer.source}: no end-of-sequence token, and none in {directory}'s "
            "generation_config.json (config.json without it); name one there as eos_token_id"
        )
    return tuple(sorted(ids))


def template_notes(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[str]:
    """What a user may not expect of the chat template, a line each."""
    if not tokenizer.has_chat_template:
        return ["prompts  the tokenizer has no chat template: plain text and a newline"]
    notes, end = [], tokenizer.turn_end()
    if end and not set(end) & set(stop_ids):
        names = [tokenizer.decode(ids, skip_special_tokens=False) for ids in (end, stop_ids)]
        notes.append(
            f"warning  the chat template ends a turn with {names[0]!r}, which ends no rollout "
            f"({names[1]!r} does); is this a base model?  Name the token as eos_token_id in "
            "generation_config.json"
        )
    on, off = (tokenizer.prompt("1 + 1", thinking) for thinking in (True, False))
    if on == off:
        notes.append(
            "prompts  the chat template ignores enable_thinking: --student-thinking, "
            "--teacher-thinking and --eval-thinking change nothing"
        )
    return notes


def prompts_digest(tokenizer: Tokenizer) -> str:
    """A fingerprint of the prompts that a tokenizer makes: of one message, in both modes."""
    ids = [tokenizer.prompt("What is 1 + 1?", thinking) for thinking in (True, False)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
