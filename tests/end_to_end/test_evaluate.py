"""tools/evaluate.py on a model whose every draw is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.launch import torchrun
from tests.models import make_answering_model

TOOL = "tools/evaluate.py"
RIGHT, K, SEED = 0.7, 3, 5
ANSWERS = ["7", "3", "7", "9"]
FLAGS = ["--k", str(K), "--seed", str(SEED), "--max-prompt-length", "32", "--dtype", "fp32"]


def make_files(directory: Path) -> list[str]:
    """Flags that name a model which says 7 with probability 0.7, else 3, and its problems."""
    model = make_answering_model(str(directory / "hf"), RIGHT)
    data = directory / "problems.jsonl"
    lines = [{"problem": f"1+{i}", "answer": a} for i, a in enumerate(ANSWERS)]
    data.write_text("".join(json.dumps(x) + "\n" for x in lines))
    template = directory / "template.txt"
    template.write_text("{problem}")
    return ["--hf-model", model, "--data", str(data), "--student-template", str(template), *FLAGS]


def expected() -> list[list[bool]]:
    """Sample n of the evaluation draws its second token with the second number of its stream."""

    def says(sample: int) -> str:
        generator = np.random.Generator(np.random.Philox(key=[SEED, sample]))
        return "7" if generator.random(2)[1] < RIGHT else "3"

    return [[says(p * K + draw) == a for draw in range(K)] for p, a in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return make_files(tmp_path_factory.mktemp("evaluate"))


def test_every_draw_is_graded_as_it_must_be(files: list[str], tmp_path: Path) -> None:
    output = tmp_path / "new" / "average.json"
    done = torchrun(2, TOOL, *files, "--output", str(output), timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(output.read_text())
    assert report["correct"] == expected()
    assert {True, False} == {good for row in expected() for good in row}
    mean = np.mean(expected())
    assert report["average_at_k"] == pytest.approx(mean)
    assert report["interval_95"][0] <= mean <= report["interval_95"][1]
    assert f"Average@3 {100 * mean:.2f} %" in done.stdout


def test_mistakes(files: list[str], tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"problem": "1+1"}\n')
    for flags, message in (
        (["--k", "0"], "--k 0: need at least 1"),
        (["--data", str(blank)], "problem 1 has no 'answer'; see --answer-field"),
    ):
        done = torchrun(1, TOOL, *files, *flags, timeout=120)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], done.stderr[-2000:]
