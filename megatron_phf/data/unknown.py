"""Characters that a tokenizer does not know: one line that says so, with an example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_phf.data.tokenizer import PLAIN_TEMPLATE, Tokenizer

# A tokenizer that spells any text (in bytes, for instance) knows these two; else it is looked at.
_RARE = ("\U0002a6d6", "\u0378")
_AROUND = 20  # characters of the example on each side


def _knows(tokenizer: Tokenizer, character: str) -> bool:
    ids = tokenizer.encode(character)
    # Nothing at all: some tokenizers drop what they do not know; all may drop white space.
    return tokenizer.unknown_id not in ids and (bool(ids) or character.isspace())


def _example(texts: Sequence[str], unknown: set[str]) -> str:
    for text in texts:
        position = next((i for i, character in enumerate(text) if character in unknown), None)
        if position is not None:
            around = text[max(0, position - _AROUND) : position + _AROUND]
            return f"{text[position]!r} in {around!r}"
    return f"a word in {texts[0][: 4 * _AROUND]!r}"


def unknown_tokens(
    tokenizer: Tokenizer, messages: Iterable[str], prompts: Sequence[Sequence[int]]
) -> str | None:
    """What of ``messages`` the tokenizer does not know, as a warning; None if it knows all.

    Args:
        messages: what users are made to say, without the chat template.
        prompts: their token ids.
    """
    if all(_knows(tokenizer, character) for character in _RARE):
        return None
    form = "{message}" if tokenizer.has_chat_template else PLAIN_TEMPLATE
    texts = [form.format(message=message) for message in messages]
    unknown = {c for c in set().union(*texts) if not _knows(tokenizer, c)}
    counts = [list(prompt).count(tokenizer.unknown_id) for prompt in prompts]  # type: ignore[arg-type]
    if not unknown and not any(counts):
        return None
    first = [text for text, count in zip(texts, counts, strict=True) if count] or texts
    return (
        f"the tokenizer does not know {_example(first, unknown)}: {sum(counts)} unknown tokens in "
        f"{sum(map(bool, counts))} of {len(counts)} prompts, {len(unknown)} characters in all"
    )
