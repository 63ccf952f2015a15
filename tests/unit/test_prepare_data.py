"""The converter of public data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_phf.data.problems import read_problems
from tools.prepare_data import main

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
