"""The house's rules, read from the source: docstrings, sizes, which way imports go."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import REPO

PACKAGE = REPO / "megatron_phf"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: a folder imports those before it (a circle would need an arrow upwards).
FOLDERS = (
    "config", "runtime", "files", "hidden", "losses", "data", "model", "lora", "weights", "teacher",
    "rollout", "evaluation", "estimate", "train", "simulate", "report", "reference", "demo", "cli",
)  # fmt: skip
MOST_LINES, MOST_FLAT = 300, 6


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(where, docstring) of the module and of all classes and functions in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "module"), text


def imported(path: Path) -> Iterator[str]:
    """Modules and names of the product that a file imports, wherever in it, without the first."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide where an arrow goes"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "megatron_phf" and rest:
                yield rest


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_docstrings_begin_with_one_whole_sentence(path: Path) -> None:
    for name, text in documented(ast.parse(path.read_text())):
        first, _, rest = text.partition("\n")
        assert first.rstrip()[-1] in ".:;?", f"{path}: {name}: {first!r} ends in the midst"
        assert not rest or rest.startswith("\n"), f"{path}: {name}: a blank line after {first!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_downwards(folder: str) -> None:
    """An independent reference is under nothing of the product, and only what compares uses it."""
    below = {"reference"} if folder == "reference" else {*FOLDERS[: FOLDERS.index(folder) + 1]}
    if folder not in ("cli", "reference"):
        below -= {"reference"}
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imported(path):
            there = name.split(".")[0]
            assert there in below or not (PACKAGE / there).is_dir(), (
                f"{path.relative_to(REPO)} imports megatron_phf.{name}"
            )


def module_of(name: str) -> str | None:
    """The module that an imported name is, or stands in; None where that is a package."""
    for module in (name, name.rpartition(".")[0]):
        if (PACKAGE / f"{module.replace('.', '/')}.py").is_file():
            return module
    return None


def test_no_modules_import_each_other() -> None:
    """Within a folder too, and for annotations alone."""
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            *filter(None, map(module_of, imported(path)))
        }
        for path in FILES
        if path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_every_folder_says_what_lives_there() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(FOLDERS)
    for folder in FOLDERS:
        text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
        assert text and len(text.splitlines()) >= 3, folder
    assert len([p for p in PACKAGE.glob("*.py")]) <= MOST_FLAT


def test_the_unit_tests_mirror_the_folders() -> None:
    """What concerns one folder is tested under its name; what concerns all lies beside."""
    unit = REPO / "tests" / "unit"
    folders = {path.parent.name for path in unit.glob("*/test_*.py")}
    assert folders <= set(FOLDERS) and len(folders) > len(FOLDERS) - 4
