"""Transformer Engine's own Python: what it takes of us, and what the stand-in has of it.

Skipped where it is not installed: make test-te.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import REPO, environment
from tests.models import make_model

PACKAGE = REPO / ".venv-te"
pytestmark = pytest.mark.skipif(
    not (PACKAGE / ".ready").is_file(), reason="Transformer Engine's Python: make test-te"
)
FP8 = ["--fp8-format", "hybrid"]
FP8_WEIGHTS = ["--fp8-param-gather", "--use-distributed-optimizer"]
# What the product itself calls, with the arguments that it gives.
OURS = {
    "transformer_engine.pytorch:fp8_autocast": ["enabled"],
    "transformer_engine.pytorch.module.base:initialize_ub": [
        "shape", "tp_size", "bootstrap_backend", "quantization_modes",
    ],
    "transformer_engine.pytorch.fp8:FP8GlobalStateManager.is_fp8_available": [],
    "transformer_engine.pytorch.fp8:FP8GlobalStateManager.is_mxfp8_available": [],
    "transformer_engine.pytorch.fp8:FP8GlobalStateManager.is_fp8_block_scaling_available": [],
}  # fmt: skip


def ask(question: str, directory: Path, *arguments: str) -> dict:
    """The probe's answer about the package in ``directory``."""
    command = [sys.executable, str(REPO / "tests/real_te/probe.py"), question, str(directory)]
    done = subprocess.run(
        [*command, *arguments], env=environment(), cwd=REPO, text=True, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def difference(ours: list, theirs: list | None) -> str | None:
    """What the real signature does not have, or has elsewhere."""
    if theirs is None:
        return "is not there"
    names = [p for p, _, _ in theirs]
    anything = any(kind == "VAR_KEYWORD" for _, kind, _ in theirs)
    named = [p for p, kind, _ in ours if not kind.startswith("VAR")]
    positional = [p for p, kind, _ in ours if kind == "POSITIONAL_OR_KEYWORD"]
    if not anything and set(named) - set(names):
        return f"has no {sorted(set(named) - set(names))}"
    if not anything and positional != names[: len(positional)]:
        return f"has by position {names}, not {positional}"
    needed = {p for p, kind, must in theirs if must and not kind.startswith("VAR")}
    return f"needs {sorted(needed - set(named))}" if needed - set(named) else None


@pytest.fixture(scope="module")
def signatures() -> tuple[dict, dict]:
    """The stand-in's, and the real package's of the same names and of ``OURS``."""
    fake = ask("signatures", REPO / "tests" / "fake_te")
    return fake, ask("signatures", PACKAGE, *fake, *OURS)


def test_the_stand_in_has_the_real_signatures(signatures: tuple[dict, dict]) -> None:
    """Each name is there; parameters have the real names, and by position the real order."""
    fake, real = signatures
    assert len(fake) > 30
    wrong = {name: difference(ours, real[name]) for name, ours in fake.items()}
    assert not {name: text for name, text in wrong.items() if text}


@pytest.mark.parametrize("name", OURS)
def test_our_calls_bind(name: str, signatures: tuple[dict, dict]) -> None:
    real = signatures[1][name]
    assert real is not None
    assert set(OURS[name]) <= {p for p, _, _ in real}
    assert {p for p, kind, must in real if must and not kind.startswith("VAR")} <= {*OURS[name]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_model(str(tmp_path_factory.mktemp("te") / "qwen3"))


@pytest.mark.parametrize(
    "flags",
    [[], [*FP8, "--fp8-recipe", "tensorwise"], [*FP8[:1], "e4m3", "--fp8-recipe", "blockwise"]],
    ids=["bf16", "tensorwise", "blockwise"],
)
def test_megatrons_calls_bind(flags: list[str], model: str) -> None:
    """The real constructors run under megatron-core's wrappers; the weights are read."""
    assert ask("weights", PACKAGE, model, "--dtype", "bf16", *flags)["parameters"] == 34


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_fp8_weights_and_their_masters(recipe: str, model: str) -> None:
    """The optimizer's fp32 weights, and a teacher's, are those read, not rounded, not random."""
    flags = ["--dtype", "bf16", *FP8, "--fp8-recipe", recipe, *FP8_WEIGHTS]
    found = ask("weights", PACKAGE, model, *flags)
    assert found["rounded"] == 16  # four linears in each of four layers
    assert found["masters"] == found["teacher"] == 0.0
    assert 0.0 < found["weights"] <= found["largest"] / 16


def test_the_real_fused_adam_goes_on_from_torchs() -> None:
    found = ask("adam", PACKAGE)
    assert found == {"whole": pytest.approx(0, abs=1e-6), "distributed": pytest.approx(0, abs=1e-6)}
