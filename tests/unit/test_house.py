"""The house's rules, read from the source: docstrings, sizes, which way imports go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import REPO

PACKAGE = REPO / "megatron_phf"
FILES = sorted(PACKAGE.rglob("*.py"))


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(where, docstring) of the module and of all classes and functions in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "module"), text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_docstrings_begin_with_one_whole_sentence(path: Path) -> None:
    for name, text in documented(ast.parse(path.read_text())):
        first, _, rest = text.partition("\n")
        assert first.rstrip()[-1] in ".:;?", f"{path}: {name}: {first!r} ends in the midst"
        assert not rest or rest.startswith("\n"), f"{path}: {name}: a blank line after {first!r}"
