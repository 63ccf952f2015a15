"""Tokenizers: one small interface for prompts, stop tokens and decoding.

HuggingFace tokenizers come from transformers itself: megatron-core's wrapper loads the slow kind,
and its ``add_special_tokens`` forgets a model's additional ones.  SentencePiece files go through
megatron-core's tokenizer library.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

from megatron_phf.config.settings import Config
from megatron_phf.data.chat_template import check_chance, dated, template_text
from megatron_phf.data.special_text import SpecialText

# What a tokenizer without a chat template makes of a message, with BOS before it where it has one.
PLAIN_TEMPLATE = "{message}\n"
# How chat formats write their marks, which SentencePiece files may have as symbols of the user.
_CONTROL_LIKE = re.compile(
    r"<\|[^<>|\s]+\|>|</?(?:s|bos|eos|pad|(?:start|end)_of_\w+)>|\[/?[A-Z_]{2,}\]"
)


_ANSWER = "7351"  # which no template has


class Tokenizer(Protocol):
    """What the job asks of a tokenizer."""

    source: str  # the flag and path it came from, for messages
    largest_id: int  # of all its tokens, added ones too
    eos_id: int | None
    unknown_id: int | None  # of the token that stands for what it does not know
    has_chat_template: bool
    says_the_date: bool  # its chat template does

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens around it or in it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; special tokens by name, or left out."""

    def protect(self, text: str) -> str:
        """``text`` so that :meth:`prompt` takes all of it as text, names of special tokens too."""

    def prompts(self, messages: Sequence[str], thinking: bool) -> list[list[int]]:
        """Ids of users' messages, each up to where the answer starts.

        ``thinking``: the chat template's ``enable_thinking``.  Without a chat template:
        ``PLAIN_TEMPLATE``.
        """

    def prompt(self, message: str, thinking: bool) -> list[int]:
        """Those of one message."""
        return self.prompts([message], thinking)[0]

    def turn_end(self) -> list[int]:
        """Ids that the chat template puts behind an answer; none where that cannot be told."""


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that the model of a fast tokenizer falls back to, else of its unknown token."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", None) or getattr(tokenizer, "unk_token", None)
    return None if not token else tokenizer.convert_tokens_to_ids(token)


class HFTokenizer(Tokenizer):
    """A transformers tokenizer."""

    def __init__(
        self, tokenizer: Any, source: str = "--hf-model", moment: datetime | None = None
    ) -> None:
        """``moment``: what a chat template reads as now (default: when this is made).

        Raises:
            ValueError: the chat template draws random numbers.
        """
        self._tokenizer = tokenizer
        self.source = source
        self.largest_id = max(tokenizer.get_vocab().values())
        self.eos_id: int | None = tokenizer.eos_token_id
        self.unknown_id = _unknown_id(tokenizer)
        template = template_text(getattr(tokenizer, "chat_template", None))
        check_chance(template, source)
        self.has_chat_template = bool(template)
        self.says_the_date = "strftime_now" in template
        self._dated = dated(template, moment or datetime.now()) if self.says_the_date else {}
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

    def prompts(self, messages: Sequence[str], thinking: bool) -> list[list[int]]:
        """By the chat template; without one, plain text behind the tokenizer's BOS.

        Raises:
            ValueError: the chat template fails, or makes nothing of a message.
        """
        if not self.has_chat_template:
            texts = [PLAIN_TEMPLATE.format(message=message) for message in messages]
            return [self._before_text + self._text_ids(text) for text in texts]
        protected = [m for m in messages if self._special.is_protected(m)]
        plain = [m for m in messages if not self._special.is_protected(m)]
        texts = self._render(protected, thinking, tokenize=False)
        encoded = self._render(plain, thinking, tokenize=True, return_dict=False)
        if not all(encoded) or not all(texts):
            raise ValueError(
                f"{self.source}: its chat template makes an empty prompt; correct "
                "chat_template.jinja, or chat_template in tokenizer_config.json"
            )
        ids, others = iter(encoded), map(self._text_ids, texts)
        return [list(next(others if self._special.is_protected(m) else ids)) for m in messages]

    def turn_end(self) -> list[int]:
        """What stands behind the last message; nothing without a template that takes answers."""
        roles = (("user", "0"), ("assistant", _ANSWER))
        chat = [{"role": role, "content": text} for role, text in roles]
        end = ""
        with contextlib.suppress(Exception):  # a template is a program, and can fail in any way
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, **self._dated)
            end = text.rpartition(_ANSWER)[2].strip()
        return self._text_ids(end)

    def _render(self, messages: Sequence[str], thinking: bool, **options: bool) -> Any:
        if not messages:
            return []
        try:
            return self._tokenizer.apply_chat_template(
                [[{"role": "user", "content": message}] for message in messages],
                add_generation_prompt=True,
                enable_thinking=thinking,
                **self._dated,
                **options,
            )
        except Exception as error:  # as above
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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file, which has no chat template; ``thinking`` changes nothing."""

    has_chat_template = says_the_date = False

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

    def prompts(self, messages: Sequence[str], thinking: bool) -> list[list[int]]:
        """Plain text, after BOS where the file has one."""
        return [self._bos + self.encode(PLAIN_TEMPLATE.format(message=m)) for m in messages]

    def turn_end(self) -> list[int]:
        """Nothing: plain text has no turns."""
        return []

    def _is_special(self, token: int) -> bool:
        return token > self.largest_id or self._library.tokenizer.is_control(token)

    def _name(self, token: int) -> str:
        return self._library.vocab[token] if token <= self.largest_id else f"<{token}>"


def load_hf(path: str, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of a directory.

    Raises:
        ValueError: it has special tokens alone.
        Exception: of any kind, by file and format, where it does not load.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path, local_files_only=True, trust_remote_code=trust_remote_code
    )
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    if not set(tokenizer.get_vocab()) - added:
        raise ValueError(
            f"transformers' {type(tokenizer).__name__} finds special tokens there and no "
            "vocabulary; copy tokenizer.json, or what this class reads"
        )
    return tokenizer


def _load_sentencepiece(path: str, source: str) -> Tokenizer:
    from megatron.core.tokenizers.text.libraries import sentencepiece_tokenizer

    return SentencePieceTokenizer(sentencepiece_tokenizer.SentencePieceTokenizer(path), source)


def load_tokenizer(config: Config, moment: datetime | None = None) -> Tokenizer:
    """The tokenizer of ``--tokenizer-model``, else of ``--hf-model``.

    ``moment``: what its chat template reads as now.  Nothing is downloaded, and no code from there
    is run without ``--trust-remote-code``.

    Raises:
        ValueError: it is missing or damaged, or needs code that is not trusted.
    """
    path = config.tokenizer.tokenizer_model or config.model.hf_model
    assert path is not None
    source = f"{'--tokenizer-model' if config.tokenizer.tokenizer_model else '--hf-model'} {path}"
    try:
        if config.tokenizer.tokenizer_type == "SentencePieceTokenizer":
            return _load_sentencepiece(path, source)
        library = load_hf(path, config.model.trust_remote_code)
    except Exception as error:  # each library raises many kinds, by file and format
        reason = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in reason:
            reason = "it is Python code; read it, and allow it with --trust-remote-code"
        raise ValueError(f"{source}: its tokenizer does not load ({reason})") from error
    return HFTokenizer(library, source, moment)
