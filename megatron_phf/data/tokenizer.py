"""Tokenizers: one small interface for prompts, stop tokens and decoding.

HuggingFace tokenizers come from transformers itself: megatron-core's wrapper loads the slow kind,
and its ``add_special_tokens`` forgets a model's additional ones.  SentencePiece files go through
megatron-core's tokenizer library.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

from megatron_phf.config import Config
from megatron_phf.data.hf_files import read_json_object

# What a tokenizer without a chat template makes of a message, with BOS before it where it has one.
PLAIN_TEMPLATE = "{message}\n"


class Tokenizer(Protocol):
    """What the job asks of a tokenizer."""

    source: str  # the flag and path it came from, for messages
    largest_id: int  # of all its tokens, added ones too
    eos_id: int | None
    has_chat_template: bool

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; special tokens by name, or left out."""

    def prompt(self, message: str, thinking: bool) -> list[int]:
        """Ids of a user's message, up to where the answer starts.

        ``thinking``: the chat template's ``enable_thinking``.  Without a chat template:
        ``PLAIN_TEMPLATE``.
        """


class HFTokenizer:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any, source: str = "--hf-model") -> None:
        self._tokenizer = tokenizer
        self.source = source
        self.largest_id = max(tokenizer.get_vocab().values())
        self.eos_id: int | None = tokenizer.eos_token_id
        self.has_chat_template = getattr(tokenizer, "chat_template", None) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def prompt(self, message: str, thinking: bool) -> list[int]:
        """By the chat template; without one, plain text with the tokenizer's special tokens."""
        if not self.has_chat_template:
            text = PLAIN_TEMPLATE.format(message=message)
            return list(self._tokenizer(text, add_special_tokens=True)["input_ids"])
        try:
            ids = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                enable_thinking=thinking,
            )
        except Exception as error:  # a template is a program, and can fail in any way
            raise ValueError(
                f"{self.source}: its chat template fails ({type(error).__name__}: {error}); "
                "correct chat_template.jinja, or chat_template in tokenizer_config.json"
            ) from error
        return list(ids)


class SentencePieceTokenizer:
    """A SentencePiece model file, which has no chat template; ``thinking`` changes nothing."""

    has_chat_template = False

    def __init__(self, library: Any, source: str = "--tokenizer-model") -> None:
        self._library = library
        self.source = source
        self.largest_id = library.vocab_size - 1
        # SentencePiece says -1 for a token that the file does not have.
        self.eos_id: int | None = library.eos_id if library.eos_id >= 0 else None
        self._bos = [library.bos_id] if library.bos_id >= 0 else []

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it."""
        return list(self._library.text_to_ids(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; an id beyond the file counts as a special token."""
        parts = []
        for special, run in groupby(ids, self._is_special):
            if not special:
                parts.append(self._library.ids_to_text(list(run)))
            elif not skip_special_tokens:
                parts += [self._name(i) for i in run]
        return "".join(parts)

    def prompt(self, message: str, thinking: bool) -> list[int]:
        """Plain text, after BOS where the file has one."""
        return self._bos + self.encode(PLAIN_TEMPLATE.format(message=message))

    def _is_special(self, token: int) -> bool:
        return token > self.largest_id or self._library.tokenizer.is_control(token)

    def _name(self, token: int) -> str:
        return self._library.vocab[token] if token <= self.largest_id else f"<{token}>"


def _load_hf(path: str, source: str, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path, local_files_only=True, trust_remote_code=trust_remote_code
    )
    return HFTokenizer(tokenizer, source)


def _load_sentencepiece(path: str, source: str, trust_remote_code: bool) -> Tokenizer:
    from megatron.core.tokenizers.text.libraries import sentencepiece_tokenizer

    return SentencePieceTokenizer(sentencepiece_tokenizer.SentencePieceTokenizer(path), source)


TOKENIZER_TYPES = {"HFTokenizer": _load_hf, "SentencePieceTokenizer": _load_sentencepiece}


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of ``--tokenizer-model``, else of ``--hf-model``.

    Nothing is downloaded, and no code from there is run without ``--trust-remote-code``.

    Raises:
        ValueError: it is missing or damaged, or needs code that is not trusted.
    """
    path = config.tokenizer.tokenizer_model or config.model.hf_model
    assert path is not None
    source = f"{'--tokenizer-model' if config.tokenizer.tokenizer_model else '--hf-model'} {path}"
    try:
        return TOKENIZER_TYPES[config.tokenizer.tokenizer_type](
            path, source, config.model.trust_remote_code
        )
    except Exception as error:  # each library raises many kinds, by file and format
        reason = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in reason:
            reason = "it is Python code; read it, and allow it with --trust-remote-code"
        raise ValueError(f"{source}: its tokenizer does not load ({reason})") from error


def check_token_ids(tokenizer: Tokenizer, stop_ids: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError where a token, added ones too, or a stop id has no row in the embedding."""
    largest = max(tokenizer.largest_id, *stop_ids)
    if largest >= vocab_size:
        what = "a tokenizer" if largest == tokenizer.largest_id else "generation_config.json"
        raise ValueError(
            f"{tokenizer.source}: {what} with token ids up to {largest}, but the model's embedding "
            f"has {vocab_size} rows (ids 0 to {vocab_size - 1}); tokenizer and weights are of "
            "different models, or the embedding was not resized for added tokens"
        )


def _generation_stop_ids(directory: str) -> set[int]:
    path = os.path.join(directory, "generation_config.json")
    if not os.path.isfile(path):
        return set()
    found = read_json_object(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{path}: eos_token_id is no token id; copy the model again")
    return set(ids)


def stop_token_ids(tokenizer: Tokenizer, directory: str) -> tuple[int, ...]:
    """Ids that end a rollout: the tokenizer's EOS and those of ``generation_config.json``.

    Raises:
        ValueError: there are none, or that file is damaged.
    """
    ids = _generation_stop_ids(directory)
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    if not ids:
        raise ValueError(
            f"{tokenizer.source}: no end-of-sequence token, and none in {directory}'s "
            "generation_config.json; name one there as eos_token_id"
        )
    return tuple(sorted(ids))
