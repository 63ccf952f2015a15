"""Private names of other packages: one file has them all, and each is looked for at start-up."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_phf.cli import main
from megatron_phf.runtime import device, private_names
from megatron_phf.simulate import torch_names
from tests.launch import REPO

HOME = "megatron_phf/runtime/private_names.py"
SIMULATION = "megatron_phf/simulate/torch_names.py"  # the dry run's, which no job looks for
OWN = ("megatron_phf", "tools", "tests", "benchmarks")
# Of Python itself: the documented way to leave at once, the flags that a parser knows, a caller.
ALLOWED = {"os._exit", "self._option_string_actions", "sys._getframe"}
FILES = [p for f in ("megatron_phf", "tools", "examples") for p in sorted((REPO / f).rglob("*.py"))]
PACKAGES = (
    *(private_names.TORCH, private_names.MEGATRON, private_names.MBRIDGE),
    *(torch_names.TORCH, torch_names.MEGATRON),
)
TABLE = {
    part
    for package in PACKAGES
    for name in package.names
    for part in name.replace(":", ".").split(".")
    if part.startswith("_")
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """What the project itself defines, anywhere."""
    names = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def foreign(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of other packages that ``tree`` uses."""
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(OWN):
            imported |= {a.asname or a.name: f"{node.module}:{a.name}" for a in node.names}
            names = [*(node.module or "").split("."), *(a.name for a in node.names)]
            yield from (f"import {name}" for name in names if private(name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in own or (node.attr in TABLE and not mine):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and node.value in TABLE:
            yield repr(node.value)
        elif isinstance(node, ast.ClassDef):
            yield from overridden(node, imported)


def overridden(node: ast.ClassDef, imported: dict[str, str]) -> Iterator[str]:
    methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and private(n.name)]
    bases = [b.id for b in node.bases if isinstance(b, ast.Name) and not hasattr(builtins, b.id)]
    for base in (private_names.find(imported[b]) for b in bases if b in imported):
        yield from (f"{node.name}.{m} of {base}" for m in methods if hasattr(base, m))


def test_no_other_file_uses_one() -> None:
    trees = {str(p.relative_to(REPO)): ast.parse(p.read_text()) for p in FILES}
    home, _ = trees.pop(HOME), trees.pop(SIMULATION)
    own = own_names(list(trees.values()))
    found = [f"{path}: {use}" for path, tree in trees.items() for use in foreign(tree, own)]
    assert [f for f in found if f.split(": ")[1] not in ALLOWED] == []
    assert set(foreign(home, own)) >= {repr("_OTHER_MAPPING"), "base._MLP_MAPPING"}


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._foreach_add_(a, b)",
        "from mbridge.core.bridge import _MODEL_REGISTRY",
        "from megatron.core._private import x",
        "fields = {'_MLP_MAPPING': {}}",
        "from megatron.core.models.gpt.gpt_model import GPTModel\n"
        "class A(GPTModel):\n  def _postprocess(self): pass",
    ],
)
def test_uses_are_found(code: str) -> None:
    assert len(list(foreign(ast.parse(code), {"_postprocess"}))) == 1


def test_the_table_has_no_more_than_is_used() -> None:
    """A name that went out of use leaves the table: it would stop a start for nothing."""
    files = {p: p.read_text() for p in FILES}
    for package in PACKAGES:
        for name in package.names:
            last = name.replace(":", ".").rsplit(".", 1)[1]
            uses = sum(text.count(last) for text in files.values())
            assert uses > 1, name


@pytest.mark.parametrize(
    ("package", "owner", "name"),
    [
        ("torch", "torch.cuda.memory", "_dump_snapshot"),
        ("megatron-core", "megatron.core.models.gpt.gpt_model:GPTModel", "_postprocess"),
        ("mbridge", "mbridge.core.bridge", "_MODEL_REGISTRY"),
    ],
)
def test_a_missing_name_ends_the_start_with_one_error(
    package: str, owner: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_names.check()
    module, _, cls = owner.partition(":")
    holder = private_names.find(f"{module}:{cls}") if cls else importlib.import_module(module)
    monkeypatch.delattr(holder, name)
    with pytest.raises(ValueError) as caught:
        device.setup()  # before it changes anything of torch
    text = str(caught.value)
    version = importlib.metadata.version(package)
    assert text.startswith(f"{package} {version} has no {owner.replace(':', '.')}.{name}, which")
    assert "; seen to work: " + package in text


def test_transformer_engine_has_its_own_table() -> None:
    names = private_names.ENGINE.names
    assert "transformer_engine.pytorch.module.base:initialize_ub" in names
    with pytest.raises(ValueError) as caught:
        private_names.check([private_names.ENGINE])  # of a machine that has none
    assert str(caught.value).startswith("transformer-engine (not installed) has no ")
    assert "seen to work: transformer-engine 2.16.1 and 2.20.2" in str(caught.value)


def test_megatron_core_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.19 imports it, and a CPU's build of torch does not bring it."""

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(device.cuda_on_cpu, "import_uncompiled", missing)
    with pytest.raises(ValueError, match="imports triton, which is not installed: pip install"):
        device.import_megatron()


def test_setup_py_asks_for_triton_where_megatron_core_needs_it() -> None:
    assert "\"triton; python_version >= '3.12'" in Path(REPO, "setup.py").read_text()


@pytest.mark.parametrize("version", ["0.16.1", "0.19.2"])
def test_what_megatron_core_says_of_itself_is_not_said_by_every_rank(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A filter, not silence: what it says of a run is heard."""
    said = {
        "0.16.1": "full scope is deprecated. Use empty cuda_graph_scope instead.",
        "0.19.2": "MimoModelConfig is experimental and still under active development.",
    }[version]
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")

    def start() -> None:
        warnings.warn(said, stacklevel=1)
        warnings.warn("this run is in trouble", stacklevel=1)
        logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
        logger.warning("this model is in trouble")

    filters = list(logger.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main.leave_on_error(start)
    logger.filters[:] = filters
    assert [str(w.message) for w in caught] == ["this run is in trouble"]
    assert [r.getMessage() for r in caplog.records] == ["this model is in trouble"]
