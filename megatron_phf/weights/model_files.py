"""Which files of a HuggingFace directory, beside the weights, make the model and its tokenizer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_phf.files.foreign import read_json_object
from megatron_phf.files.replace import MARKER

# What transformers' tokenizers read (the VOCAB_FILES_NAMES of its classes, and the constants of
# tokenization_utils_base.py and hub.py).
_TOKENIZER_SUFFIXES = (
    *(".model", ".jinja", ".tiktoken", ".bpe", ".spm", ".vocab", ".codes", ".tokenizer"),
)
_TOKENIZER_NAMES = {
    *("special_tokens_map.json", "added_tokens.json", "tokenizer_config.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "dict.txt", "chat_template.json", "tekken.json", "emoji.json"),
    *("normalizer.json", "byte_maps.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json"),
    *("target_vocab.json", "word_pronunciation.json", "word_shape.json"),
}
TEMPLATES = "additional_chat_templates"
_OTHER_SUFFIXES = (".json", ".txt")
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", re.MULTILINE)


def _is_tokenizer_file(name: str) -> bool:
    return (
        name in _TOKENIZER_NAMES
        or name.endswith(_TOKENIZER_SUFFIXES)
        or name.startswith("tokenizer.")  # tokenizer.json, tokenizer.model.v3
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _code(directory: str, configuration: str) -> set[str]:
    """The Python files that the ``auto_map`` of a configuration names, and what those import.

    A name of another repository (``owner/name--module.Class``) is no file here.
    """
    path = os.path.join(directory, configuration)
    if not os.path.isfile(path):
        return set()
    entries = _strings(read_json_object(path).get("auto_map"))
    left, found = [entry.split(".")[0] for entry in entries], set()
    while left:
        name = left.pop() + ".py"
        path = os.path.join(directory, name)
        if name in found or os.sep in name or not os.path.isfile(path):
            continue
        found.add(name)
        with open(path, encoding="utf-8", errors="replace") as f:
            left += [first or second for first, second in _RELATIVE_IMPORT.findall(f.read())]
    return found


def tokenizer_files(directory: str) -> list[str]:
    """The files of the tokenizer, relative to ``directory``; its Python code included."""
    names = {name for name in os.listdir(directory) if _is_tokenizer_file(name)}
    folder = os.path.join(directory, TEMPLATES)
    if os.path.isdir(folder):
        names |= {os.path.join(TEMPLATES, n) for n in os.listdir(folder) if n.endswith(".jinja")}
    return sorted(names | _code(directory, "tokenizer_config.json"))


def other_files(directory: str) -> list[str]:
    """The files that are neither weights nor the tokenizer's."""
    names = {n for n in os.listdir(directory) if n.endswith(_OTHER_SUFFIXES) and ".index." not in n}
    names |= _code(directory, "config.json")
    return sorted(names.difference(tokenizer_files(directory), [MARKER]))


def copy_files(source: str, target: str, names: Iterable[str]) -> None:
    """Copy what exists of ``names``, each relative to both directories."""
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
