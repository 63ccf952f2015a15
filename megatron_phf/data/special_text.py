"""Text that names a special token stays text: a problem with ``<|im_end|>`` in it ends no message.

transformers matches special tokens wherever their names stand.  Those of a chat template must be
matched, those in a problem's or solution's text must not.
"""

from __future__ import annotations

import copy
import re
from functools import cached_property
from typing import Any

# Noncharacters, which no text has: inside a name that must stay text; around one that must not.
_MARK, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"


def _any_of(names: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


class SpecialText:
    """The special tokens of a transformers tokenizer, as they stand in texts."""

    def __init__(self, tokenizer: Any, unknown_id: int | None) -> None:
        """``unknown_id``: the special token, if any, that stands for unknown characters."""
        self._tokenizer, self._unknown_id = tokenizer, unknown_id
        added = getattr(tokenizer, "added_tokens_decoder", {})  # not every class has one
        self._special = {i: token for i, token in added.items() if token.special and token.content}
        names = sorted((t.content for t in self._special.values()), key=len, reverse=True)
        self._names = _any_of(names)
        self._marked = _any_of([name[0] + _MARK + name[1:] for name in names])

    def protect(self, text: str) -> str:
        """``text`` with marks in all names of special tokens: :meth:`encode` makes text of those.

        Raises:
            ValueError: it has one of the marks already.
        """
        if _MARK in text or _OPEN in text or _CLOSE in text:
            raise ValueError("a text has U+FDD0, U+FDD1 or U+FDD2, which are no characters")
        return self._names.sub(lambda match: match[0][0] + _MARK + match[0][1:], text)

    @staticmethod
    def is_protected(text: str) -> bool:
        """Whether :meth:`protect` found anything in a part of ``text``."""
        return _MARK in text

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``: names without marks are special tokens, names with marks are text.

        Exactly what the tokenizer makes of it if it knows the former alone: in a copy those are
        added under other names, and special tokens are not looked for.

        Raises:
            ValueError: the tokenizer cannot; names the text.
        """
        names = [match[0].replace(_MARK, "") for match in self._marked.finditer(text)]
        if not getattr(self._tokenizer, "is_fast", False):
            raise ValueError(
                f"a text has {names[0]!r}, the name of a special token, and a tokenizer in Python "
                "cannot encode it as text; write it otherwise"
            )
        own = len(self._names.findall(text))
        renamed = self._names.sub(lambda match: _OPEN + match[0] + _CLOSE, text)
        ids = self._copy.encode(
            renamed.replace(_MARK, ""), add_special_tokens=False, split_special_tokens=True
        )
        unwanted = set(self._tokenizer.convert_tokens_to_ids(names)) - {self._unknown_id}
        if unwanted & set(ids) or sum(i in self._original for i in ids) != own:
            raise ValueError(
                f"a text has {names[0]!r}, and the tokenizer makes a special token of it even as "
                "text; write it otherwise"
            )
        return [self._original.get(i, i) for i in ids]

    @cached_property
    def _copy(self) -> Any:
        from tokenizers import AddedToken

        other = copy.deepcopy(self._tokenizer)
        other.add_tokens(
            [
                AddedToken(
                    _OPEN + token.content + _CLOSE,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=token.normalized,
                    special=False,
                )
                for token in self._special.values()
            ]
        )
        return other

    @cached_property
    def _original(self) -> dict[int, int]:
        """Id of the copy's token of another name -> id of the special token."""
        found = self._copy.convert_tokens_to_ids(
            [_OPEN + token.content + _CLOSE for token in self._special.values()]
        )
        return dict(zip(found, self._special, strict=True))
