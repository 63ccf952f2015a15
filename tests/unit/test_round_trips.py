"""What the product writes, the product reads: any numbers, and every flag that changes a form."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.data.problems import Problem
from megatron_phf.data.rollouts import (
    Rollout,
    read_rollouts,
    read_sampled,
    rollout_to_json,
    write_sampled,
)
from megatron_phf.evaluation.evaluate import Answer, Evaluation
from megatron_phf.evaluation.generations import GenerationStore
from megatron_phf.files.appended import AppendedLines
from megatron_phf.files.replace import write_json
from megatron_phf.hidden.spec import flow_spec, flow_weights, terms_of
from megatron_phf.report.page import write_report
from megatron_phf.report.runs import Run, Variant, read_run, read_variants
from megatron_phf.report.statistics import (
    entropy_by_step,
    estimates_by_step,
    layer_rows,
    mean_shares,
)
from megatron_phf.runtime import parallel
from megatron_phf.train import evaluation as train_evaluation
from megatron_phf.train.metrics import StepMetrics, _flow_metrics
from megatron_phf.train.run_files import plain_config
from tests.unit.test_fuzz import BOUNDED

NOT_FINITE = [math.nan, math.inf, -math.inf]
numbers = st.floats(width=32) | st.sampled_from(NOT_FINITE)
optional = st.none() | numbers
TERMS = ("direction,geometry,adjacent", "direction", "adjacent", "cka,mse", "pointwise,last_layer")


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def flow_fields(values: list[float] | None, layers: int, config: Config) -> dict:
    """As a step has them: of so many layers, each term's numbers drawn from ``values``."""
    spec = flow_spec(config)
    terms = terms_of(spec)
    tap = SimpleNamespace(terms=terms, weights=flow_weights(layers, spec))
    per_layer = None
    if values is not None:
        count = len(terms) * layers
        drawn = (values * count)[:count]
        per_layer = torch.tensor(drawn, dtype=torch.float64).view(len(terms), layers)
    return _flow_metrics(per_layer, tap, config)


def write_run(path: Path, config: Config, steps: list[dict]) -> Run:
    content = {"run_name": config.output.run_name, "seed": config.train.seed}
    write_json(str(path / "run.json"), {**content, "config": plain_config(config)})
    lines = AppendedLines(str(path / "metrics.jsonl"), "metrics")
    assert lines.add({"step": i, **step} for i, step in enumerate(steps, start=1)) is None
    return read_run(str(path))


@BOUNDED
@given(
    st.sampled_from(TERMS), st.integers(1, 4), st.lists(numbers, min_size=1, max_size=9), optional,
    st.lists(numbers, min_size=8, max_size=8), st.integers(0, 9), st.booleans(),
)  # fmt: skip
@example(TERMS[0], 1, [0.5], 0.5, [math.nan] * 8, 0, False)
@example(TERMS[0], 3, [0.5, math.nan, 0.25], None, [0.5] * 8, 7, True)
def test_metrics(
    terms: str, layers: int, values: list[float], unknown: float | None, known: list[float],
    tokens: int, computed: bool,
) -> None:  # fmt: skip
    """Of steps that trained on nothing, or were not finite, in a model of one layer too."""
    config = Config().replaced(phf_terms=terms, phf_alpha=0.05)
    extra = {
        "seconds": {"rollout": 1.0}, "memory_bytes": {"rollout": 5}, "mfu": unknown,
        "rollout_lengths": {"mean": known[5], "min": 0, "max": 4, "cut": None},
        "collapse_signs": {"length": known[6]}, "copied_words": unknown, "nonfinite_steps": tokens,
        "opsd_by_teacher": {"a": unknown, "b": None}, "peak_memory_bytes": 7,
    }  # fmt: skip
    fields = flow_fields(values if computed else None, layers, config)
    step = StepMetrics(
        known[0], known[1], fields["flow"], fields["flow_terms"], known[2], known[3], known[4],
        "none", unknown, known[7], unknown, tokens, extra,
    ).as_json()  # fmt: skip
    with folder() as path:
        run = write_run(path, config, [step, step])
    assert [line["step"] for line in run.steps] == [1, 2]
    variant = Variant(run.name, [run])
    for term in terms_of(flow_spec(config)):
        layer_rows(variant, f"flow_{term.name}_per_{term.over}")
    for key in ("loss", "flow", "grad_norm"):
        estimates_by_step(variant, key)
    entropy_by_step(variant)
    mean_shares(variant)


def test_a_report_of_steps_without_rollouts(tmp_path: Path) -> None:
    """Pages and pictures too; earlier versions wrote lists of nulls for such a step."""
    config = Config().replaced(phf_alpha=0.05)
    good = {"loss": 0.5, **flow_fields([0.5, 0.25, 0.125], 3, config)}
    good |= good.pop("flow_terms")
    bad = {k: [None] * len(v) if isinstance(v, list) else None for k, v in good.items()}
    none = {**bad, **flow_fields(None, 3, config)["flow_terms"]}
    for name, steps in (("some", [good, bad, good]), ("first", [bad, good]), ("none", [none, bad])):
        (tmp_path / name).mkdir()
        run = write_run(tmp_path / name, config.replaced(run_name=name), steps)
        steps, _ = layer_rows(Variant(name, [run]), "flow_direction_per_layer")
        assert steps == [line["step"] for line in run.steps if line["loss"] is not None]
    assert Path(write_report(read_variants([str(tmp_path)]), str(tmp_path / "report"))).is_file()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--preset", "phf"],
        ["--phf-terms", "direction"],
        ["--phf-terms", "cka=0.5,mse=2"],
        ["--phf-terms", "my_terms:Term"],
        ["--phf-layers", "2,3"],
        ["--run-name", "a b.½"],
        ["--teacher-hf-model", "a=X", "--teacher-hf-model", "b=Y"],
        ["--grader", "my:grade", "--keep-rollouts", "correct", "--importance-ratio-cap", "2"],
    ],
)
def test_run_files(argv: list[str], tmp_path: Path) -> None:
    config = parse_args(["--hf-model", "m", "--data", "d", *argv])
    run = write_run(tmp_path, config, [])
    assert run.name == config.output.run_name
    assert (run.flow is None) == (":" in config.method.phf_terms)
    if run.flow is not None:
        assert run.flow == flow_spec(config)


def test_metrics_of_another_place(tmp_path: Path) -> None:
    """--metrics-file; a report finds it by the run's settings."""
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    named = str(tmp_path / "elsewhere" / "m.jsonl")
    write_run(tmp_path / "out", Config().replaced(metrics_file=named), [{"loss": 1.0}])
    (tmp_path / "out" / "metrics.jsonl").rename(named)
    assert [line["loss"] for line in read_run(str(tmp_path / "out")).steps] == [1.0]
    Path(named).unlink()
    assert read_run(str(tmp_path / "out")).steps == []


ids = st.lists(st.integers(0, 250), min_size=1, max_size=5).map(tuple)
finite = st.floats(allow_nan=False, allow_infinity=False)
version = st.none() | st.integers(0, 9)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    response = draw(st.lists(st.integers(0, 250), max_size=5).map(tuple))
    n = len(response)
    of_each = {
        "log_probs": st.lists(finite, min_size=n, max_size=n),
        "response_mask": st.lists(st.booleans(), min_size=n, max_size=n),
    }
    more = {name: draw(st.none() | values.map(tuple)) for name, values in of_each.items()}
    return Rollout(
        draw(ids), draw(ids), response, **more, policy_version=draw(version),
        policy_version_end=draw(version), kept=draw(st.booleans()),
        reference=draw(st.none() | st.text()), teacher=draw(st.sampled_from([None, "a", "b"])),
    )  # fmt: skip


@BOUNDED
@given(st.lists(rollouts(), min_size=1, max_size=4), st.booleans())
def test_recordings(sampled: list[Rollout], log_probs: bool) -> None:
    """Those of a replay file, and those that wait in a checkpoint."""
    with folder() as path:
        lines = AppendedLines(str(path / "r.jsonl"), "--record-rollouts")
        assert lines.add(rollout_to_json(rollout, log_probs) for rollout in sampled) is None
        names = ["a", "b"] if all(rollout.teacher for rollout in sampled) else []
        read = read_rollouts(str(path / "r.jsonl"), 251, names)
        write_sampled(str(path / "s.jsonl"), {3: sampled})
        assert read_sampled(str(path / "s.jsonl")) == {3: sampled}
    for one, other in zip(sampled, read, strict=True):
        assert one.trained().response_ids == other.trained().response_ids
        assert (one.scored, one.kept) == (other.scored, other.kept)
        assert other.log_probs == (one.log_probs if log_probs else None)
        assert other.teacher == (one.teacher if names else None)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
answers = st.builds(Answer, texts, st.integers(0, 9), st.none() | texts, st.booleans(),
                    st.booleans())  # fmt: skip


@BOUNDED
@given(st.integers(1, 3).flatmap(lambda k: st.lists(
    st.tuples(texts, st.none() | texts, st.lists(answers, min_size=k, max_size=k)),
    min_size=1, max_size=3,
)))  # fmt: skip
def test_generations_and_evaluations(rows: list[tuple[str, str | None, list[Answer]]]) -> None:
    """What tools/evaluate.py keeps, and what a run writes of its evaluations."""
    problems = [Problem(text, "", answer, i) for i, (text, answer, _) in enumerate(rows)]
    whole = Evaluation(problems, [each for _, _, each in rows], 1.5)
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        store = GenerationStore(str(path / "e"), {"a": 1})
        store.add(whole)
        store.finish(whole)
        again = GenerationStore(str(path / "e"), {"a": 1}).done(problems)
        assert [part.answers for part in again] == [[each] for each in whole.answers]
        patch.setattr(parallel, "is_first_rank", lambda: True)
        patch.setattr(train_evaluation, "on_first_rank", lambda action, *args: action(*args))
        train_evaluation.EvaluationLog(str(path)).add(4, whole)
        assert train_evaluation.EvaluationLog(str(path), 4).averages == {4: whole.average}
        evaluation = write_run(path, Config(), []).evaluations[0]
    assert evaluation["average_at_k"] == whole.average
    assert json.loads(json.dumps(evaluation["correct"])) == whole.correct
