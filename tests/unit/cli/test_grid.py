"""tools/grid.py: which runs it makes, and which it does not repeat."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_phf.cli import grid, preflight
from megatron_phf.config.flags import parse_args
from tests.models import make_model

PRESETS = sorted(Path("examples/ablations").glob("*.args"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("grid")
    model = make_model(str(directory / "hf"))
    data = directory / "problems.jsonl"
    lines = [f'{{"problem": "1+{i}", "solution": "2", "answer": 2}}\n' for i in (1, 2)]
    data.write_text("".join(lines))
    limits = ["--max-prompt-length", "64", "--max-teacher-prompt-length", "64"]
    return ["--hf-model", model, "--data", str(data), *limits]


def test_every_preset_is_a_command_line_that_passes_the_checks(base: list[str]) -> None:
    assert len(PRESETS) >= 22
    embedded = [*base, "--phf-alpha", "0.5", "--opsd-beta", "0.5", "--opsd-clip-mode", "none"]
    runs = grid.make_runs(PRESETS, [3], Path("runs/x"), embedded, ["--lr", "0.5"])
    configs = {run.variant: parse_args(list(run.flags)) for run in runs}
    for config in configs.values():
        preflight.check(config)
    assert configs["opsd"].method.phf_alpha == 0
    assert configs["pointwise"].method.phf_terms == "pointwise"
    assert configs["sft"].rollout.rollout_engine == "reference"
    settings = {repr((c.method, c.rollout, c.data)) for c in configs.values()}
    assert len(settings) == len(PRESETS), "two presets are the same"
    assert all(c.train.seed == 3 and c.train.lr == 0.5 for c in configs.values())
    assert all(c.output.run_name == name for name, c in configs.items())


def test_a_finished_run_is_not_repeated(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], **more: object) -> int:
        calls.append(command)
        return 1 if "7" in command else 0  # seed 7 fails

    monkeypatch.setattr(grid.subprocess, "call", call)
    (tmp_path / "a.args").write_text("# nothing\n--phf-alpha 2  # much\n")
    words = [str(tmp_path / "a.args"), "--seeds", "5,7", "--output-dir", str(tmp_path / "out")]
    last = ["--", *base, "--lr", "0.{seed}"]
    assert grid.main([*words, *last]) == 1
    assert [c[c.index("--lr") + 1] for c in calls] == ["0.5", "0.7"]
    assert "1 run(s) failed" in capsys.readouterr().out
    calls.clear()
    assert grid.main([*words, *last]) == 1
    assert len(calls) == 1 and "7" in calls[0]
    assert grid.main([*words, *last, "--phf-alpha", "3"]) == 2
    assert "this run had other flags" in capsys.readouterr().err


def test_mistakes_are_found_before_the_first_run(tmp_path: Path, base: list[str], capsys) -> None:
    (tmp_path / "bad.args").write_text("--phf-alhpa 2\n")
    (tmp_path / "unclosed.args").write_text("--phf-alpha '2\n")
    for name, message in (
        ("bad.args", "error: bad, seed 1: unrecognized arguments: --phf-alhpa"),
        ("unclosed.args", "cannot be read as flags"),
        ("absent.args", "cannot be read as flags"),
    ):
        assert grid.main([str(tmp_path / name), "--", *base]) == 2
        assert message in capsys.readouterr().err
