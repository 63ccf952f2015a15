"""The vocabulary in the files of a model directory, judged before anything is loaded.  No torch."""

from __future__ import annotations

import os
from typing import Any

from megatron_phf.files.foreign import parse_json, read_json_object

# In the order in which one is taken; others that transformers knows are not read here.
_READ = ("tokenizer.json", "vocab.json", "tokenizer.model")
_OTHER_NAMES = {"vocab.txt", "tekken.json", "spiece.model"}
_OTHER_SUFFIXES = (".model", ".tiktoken", ".spm", ".bpe", ".model.v3")
_PARTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_NEEDED = "tokenizer.json, or vocab.json with merges.txt, or tokenizer.model"


def vocabulary_file(directory: str) -> str | None:
    """The file of ``directory`` that tokens and their ids are read from, where there is one."""
    paths = (os.path.join(directory, name) for name in _READ)
    return next((path for path in paths if os.path.isfile(path)), None)


def has_tokenizer(directory: str, flag: str, required: bool) -> bool:
    """Whether ``directory`` has a tokenizer; one with code of its own reads what it likes.

    Raises:
        ValueError: it has a part of one, or, where ``required``, none; names ``flag``.
    """
    names, path = set(os.listdir(directory)), vocabulary_file(directory)
    if "tokenizer_config.json" in names:
        configuration = os.path.join(directory, "tokenizer_config.json")
        if read_json_object(configuration).get("auto_map"):
            return True
    if path is not None and path.endswith("tokenizer.json") and not _entries(path):
        raise ValueError(f"{flag} {path}: its vocabulary is empty; copy it again")
    others = any(n in _OTHER_NAMES or n.endswith(_OTHER_SUFFIXES) for n in names)
    if path is not None and path.endswith("vocab.json") and not others | ("merges.txt" in names):
        raise ValueError(f"{flag} {directory}: vocab.json without merges.txt; copy that too")
    if path is not None or others:
        return True
    parts = sorted(names.intersection(_PARTS))
    if parts or required:
        what = f"{parts[0]} without a vocabulary" if parts else "no tokenizer in it"
        raise ValueError(f"{flag} {directory}: {what}; copy {_NEEDED} there too")
    return False


def _entries(path: str) -> dict[str, int]:
    """The vocabulary of a ``tokenizer.json``, without its added tokens."""
    try:
        with open(path, encoding="utf-8") as f:
            vocab: Any = parse_json(f.read())["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: [token, score] in the order of their ids
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        return dict(vocab)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no readable vocabulary ({error}); copy it again") from error


def _pieces(path: str) -> dict[str, int]:
    """The vocabulary of a SentencePiece file."""
    from sentencepiece import SentencePieceProcessor

    try:
        library = SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: no SentencePiece file ({error}); copy it again") from error
    return {library.id_to_piece(i): i for i in range(library.get_piece_size())}


def _added(path: str) -> dict[str, int]:
    """Added tokens: those of a ``tokenizer.json`` itself, or of the files beside another form."""
    directory = os.path.dirname(path)
    found: dict[str, int] = {}
    try:
        if path.endswith("tokenizer.json"):
            return {t["content"]: t["id"] for t in read_json_object(path).get("added_tokens", [])}
        for name in ("added_tokens.json", "tokenizer_config.json"):
            file = os.path.join(directory, name)
            content = read_json_object(file) if os.path.isfile(file) else {}
            if name == "added_tokens.json":
                found |= content
            else:
                decoder = content.get("added_tokens_decoder", {})
                found |= {token["content"]: int(i) for i, token in decoder.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no readable added tokens ({error}); copy it again") from error
    return found


def read_vocabulary(path: str) -> dict[str, int]:
    """Token -> id, added tokens too, of what :func:`vocabulary_file` gives.

    Raises:
        ValueError: it is damaged; names the file.
    """
    readers = {"tokenizer.json": _entries, "vocab.json": read_json_object}
    return {**readers.get(os.path.basename(path), _pieces)(path), **_added(path)}
