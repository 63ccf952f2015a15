"""Tokenizers: one small interface for prompts, stop tokens and decoding.

HuggingFace tokenizers come from transformers itself: megatron-core's wrapper loads the slow kind,
and its ``add_special_tokens`` forgets a model's additional ones.  SentencePiece files go through
megatron-core's tokenizer library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

from megatron_phf.config.settings import Config
from megatron_phf.data.special_text import SpecialText
from megatron_phf.files.foreign import read_json_object

# What a tokenizer without a chat template makes of a message, with BOS before it where it has one.
PLAIN_TEMPLATE = "{message}\n"
# How chat formats write their marks, which SentencePiece files may have as symbols of the user.
_CONTROL_LIKE = re.compile(
    r"<\|[^<>|\s]+\|>|</?(?:s|bos|eos|pad|(?:start|end)_of_\w+)>|\[/?[A-Z_]{2,}\]"
)


class Tokenizer(Protocol):
    """What the job asks of a tokenizer."""

    source: str  # the flag and path it came from, for messages
    largest_id: int  # of all its tokens, added ones too
    eos_id: int | None
    unknown_id: int | None  # of the token that stands for what it does not know
    has_chat_template: bool

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it or in it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; special tokens by name, or left out."""

    def protect(self, text: str) -> str:
        """``text`` so that :meth:`prompt` takes all of it as text, names of special tokens too."""

    def prompt(self, message: str, thinking: bool) -> list[int]:
        """Ids of a user's message, up to where the answer starts.

        ``thinking``: the chat template's ``enable_thinking``.  Without a chat template:
        ``PLAIN_TEMPLATE``.
        """


def _has_template(template: Any) -> bool:
    """Whether a tokenizer's ``chat_template`` is one: a text, or named ones with any in it."""
    if isinstance(template, dict):  # with a "default"; else transformers refuses to choose
        return bool(template) and _has_template(template.get("default", "none"))
    return template is not None and bool(str(template).strip())


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that the model of a fast tokenizer falls back to, else of its unknown token."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", None) or getattr(tokenizer, "unk_token", None)
    return None if not token else tokenizer.convert_tokens_to_ids(token)


class HFTokenizer:
    """A transformers tokenizer."""

    def __init__(self, tokenizer: Any, source: str = "--hf-model") -> None:
        self._tokenizer = tokenizer
        self.source = source
        self.largest_id = max(tokenizer.get_vocab().values())
        self.eos_id: int | None = tokenizer.eos_token_id
        self.unknown_id = _unknown_id(tokenizer)
        self.has_chat_template = _has_template(getattr(tokenizer, "chat_template", None))
        self._special = SpecialText(tokenizer, self.unknown_id)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it or in it."""
        return self._text_ids(self.protect(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def protect(self, text: str) -> str:
        """``text`` with marks in the names of special tokens."""
        return self._special.protect(text)

    def prompt(self, message: str, thinking: bool) -> list[int]:
        """By the chat template; without one, plain text behind the tokenizer's BOS.

        Raises:
            ValueError: the chat template fails, or makes nothing of the message.
        """
        if not self.has_chat_template:
            text = PLAIN_TEMPLATE.format(message=message)
            return self._before_text + self._text_ids(text)
        if self._special.is_protected(message):
            ids = self._text_ids(self._apply_chat_template(message, thinking, tokenize=False))
        else:
            ids = self._apply_chat_template(message, thinking, tokenize=True, return_dict=False)
        if not ids:
            raise ValueError(
                f"{self.source}: its chat template makes an empty prompt; correct "
                "chat_template.jinja, or chat_template in tokenizer_config.json"
            )
        return list(ids)

    def _apply_chat_template(self, message: str, thinking: bool, **options: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=True,
                enable_thinking=thinking,
                **options,
            )
        except Exception as error:  # a template is a program, and can fail in any way
            raise ValueError(
                f"{self.source}: its chat template fails ({type(error).__name__}: {error}); "
                "correct chat_template.jinja, or chat_template in tokenizer_config.json"
            ) from error

    def _text_ids(self, text: str) -> list[int]:
        if self._special.is_protected(text):
            return self._special.encode(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _before_text(self) -> list[int]:
        """What the tokenizer puts in front of a text: BOS.  What it puts behind (EOS) ends it."""
        whole, bare = (
            list(self._tokenizer("0", add_special_tokens=add)["input_ids"]) for add in (True, False)
        )
        starts = range(len(whole) - len(bare) + 1)
        return whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)]


class SentencePieceTokenizer:
    """A SentencePiece model file, which has no chat template; ``thinking`` changes nothing."""

    has_chat_template = False

    def __init__(self, library: Any, source: str = "--tokenizer-model") -> None:
        self._library = library
        self.source = source
        self.largest_id = library.vocab_size - 1
        # SentencePiece says -1 for a token that the file does not have.
        self.eos_id: int | None = library.eos_id if library.eos_id >= 0 else None
        self.unknown_id: int | None = library.unk_id
        self._bos = [library.bos_id] if library.bos_id >= 0 else []

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; the file's control tokens have no spelling in a text."""
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

    def protect(self, text: str) -> str:
        """``text`` as it is: control tokens have no spelling, symbols of the user have one.

        Raises:
            ValueError: it has such a symbol that looks like a control token.
        """
        for match in _CONTROL_LIKE.finditer(text):
            token = self._library.tokenizer.piece_to_id(match[0])
            if token != self.unknown_id and token in self.encode(match[0]):
                raise ValueError(
                    f"a text has {match[0]!r}, which {self.source} makes one token of wherever it "
                    "stands; write it otherwise"
                )
        return text

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
