"""The report: its numbers against scipy and by hand, its page against a parser, damaged runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from megatron_phf.evaluation.grading import bootstrap_interval
from megatron_phf.hidden.spec import FlowSpec
from megatron_phf.report.charts import Gallery, looks
from megatron_phf.report.page import PAGE, write_report
from megatron_phf.report.runs import read_run, read_variants
from megatron_phf.report.section import Report
from megatron_phf.report.statistics import (
    Estimate,
    entropy,
    estimate,
    estimates_by_step,
    final_accuracy,
    flow_shares,
    gains_per_hour,
    paired_difference,
)
from megatron_phf.report.tables import result
from tests.launch import REPO
from tests.report_runs import PHASES, PROBLEMS, make_run, make_study, write_lines

TOOL = str(REPO / "tools/report.py")
HOSTILE = (
    '</pre></style><script>alert(1)</script><img src=x onerror="y()">&amp;\x00$\\frac{%s {{7*7}}'
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, attributes and the visible text; fails on a tag closed in the wrong place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title", "text"):
            self.text += data


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"), ("opsd", "phf"))


@pytest.fixture(scope="module")
def page(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The tool's own output."""
    out = tmp_path_factory.mktemp("report")
    done = subprocess.run(
        [sys.executable, TOOL, str(study), "--output", str(out)],
        capture_output=True, text=True, check=False, cwd=out,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"6 runs of 2 variants: {out / PAGE}"
    yield out, (out / PAGE).read_text()


def average(directory: Path, which: int) -> float:
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    return json.loads(lines[which])["average_at_k"]


def test_estimates_are_scipys() -> None:
    values = [0.3, 0.7, 0.45, 0.6]
    e = estimate(values)
    interval = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (e.mean, e.low, e.high) == pytest.approx((np.mean(values), interval.low, interval.high))
    assert estimate([0.4]).low is None


def test_differences_are_paired_by_seed(study: Path) -> None:
    opsd, phf = read_variants([str(study)])
    assert (opsd.name, phf.name, phf.seeds) == ("opsd", "phf", [1, 2, 3])
    finals = [
        [average(study / name / f"seed{s}", -1) for s in (1, 2, 3)] for name in ("opsd", "phf")
    ]
    difference, expected = paired_difference(phf, opsd), scipy.stats.ttest_rel(finals[1], finals[0])
    interval = expected.confidence_interval(0.95)
    assert difference is not None and difference.over == "3 seeds"
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.mean == pytest.approx(np.mean(finals[1]) - np.mean(finals[0]))


def test_one_seed_is_compared_problem_by_problem(tmp_path: Path) -> None:
    """A variant that solves what the other does and one problem more: no noise but that one."""
    a, b = (make_run(tmp_path / name, name, 1) for name in ("opsd", "phf"))
    lines = [json.loads(line) for line in (a / "evaluations.jsonl").read_text().splitlines()]
    last = lines[-1]
    row = next(r for r in last["correct"] if not all(r))
    lines[-1]["correct"] = [[True] * len(r) if r is row else r for r in last["correct"]]
    lines[-1]["average_at_k"] = float(np.mean(lines[-1]["correct"]))
    write_lines(b / "evaluations.jsonl", lines)
    opsd, phf = read_variants([str(tmp_path)])
    difference = paired_difference(phf, opsd)
    assert difference is not None and difference.low is not None and difference.high is not None
    assert difference.mean == pytest.approx((len(row) - sum(row)) / len(row) / PROBLEMS)
    assert difference.low == 0 and difference.high < 4 / PROBLEMS  # each draw has few of that one
    assert difference.over == f"{PROBLEMS} problems, bootstrap"
    final = final_accuracy(opsd)
    assert final is not None and final.low is not None and final.low < final.mean


def test_a_run_that_is_not_done_is_not_compared(tmp_path: Path) -> None:
    """Its partner trained for longer; its cost ends where its last evaluation was."""
    a, b = (make_run(tmp_path / name, name, 1) for name in ("opsd", "phf"))
    lines = [json.loads(line) for line in (b / "evaluations.jsonl").read_text().splitlines()]
    write_lines(b / "evaluations.jsonl", lines[:3])
    opsd, phf = read_variants([str(a), str(b)])
    assert paired_difference(phf, opsd) is None
    report = Report([opsd, phf], opsd, Gallery(str(tmp_path), looks(["opsd", "phf"])))
    _, row = result(report).rows
    assert row[5] == "other steps: not comparable" and row[3].endswith("], step 20")
    steps = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(sum(step["seconds"].values()) for step in steps[:20])
    assert gains_per_hour(phf)[0][0] == pytest.approx(4 * seconds / 3600)


def test_curves_of_one_seed_have_intervals_over_problems(study: Path) -> None:
    (variant,) = read_variants([str(study / "phf" / "seed1")])
    curve = estimates_by_step(variant, "average_at_k", evaluations=True)
    assert list(curve) == [0, 10, 20, 30, 40]
    for step, value in curve.items():
        line = variant.runs[0].evaluations[step // 10]
        assert value.mean == pytest.approx(line["average_at_k"])
        assert (value.low, value.high) == bootstrap_interval([sum(r) / 4 for r in line["correct"]])
    (both,) = read_variants([str(study / "phf" / "seed1"), str(study / "phf" / "seed2")])
    pairs = [[e["average_at_k"] for e in run.evaluations] for run in both.runs]
    curve = estimates_by_step(both, "average_at_k", evaluations=True)
    assert curve[10] == Estimate((pairs[0][1] + pairs[1][1]) / 2)  # two seeds: no interval
    (three,) = read_variants([str(study / "phf")])
    values = [run.evaluations[1]["average_at_k"] for run in three.runs]
    assert estimates_by_step(three, "average_at_k", evaluations=True)[10] == estimate(values)


def test_gain_and_cost(study: Path, tmp_path: Path) -> None:
    (variant,) = read_variants([str(study / "phf" / "seed2")])
    ((cost, gained),) = gains_per_hour(variant)
    lines = (study / "phf/seed2/metrics.jsonl").read_text().splitlines()
    seconds = sum(sum(json.loads(line)["seconds"].values()) for line in lines)
    assert cost == pytest.approx(4 * seconds / 3600)  # four GPUs
    assert gained == pytest.approx(
        average(study / "phf/seed2", -1) - average(study / "phf/seed2", 0)
    )
    (on_cpu,) = read_variants([str(make_run(tmp_path / "r", "phf", 2, device="cpu"))])
    assert gains_per_hour(on_cpu)[0][0] == pytest.approx(cost / 4)  # one machine, four processes


def test_shares_add_up_to_the_flow_loss() -> None:
    step = {
        "flow_direction_per_layer": [0.2, 0.4, 0.6],
        "flow_geometry_per_layer": [0.02, 0.04, 0.0],
        "flow_adjacent_per_pair": [0.1, 0.3],
    }
    whole = ((0.4 + 0.02) / 2 + 0.2) / 2
    layers = [(0.22 / 6 + 0.05 / 2) / 2, (0.44 / 6 + 0.2 / 2) / 2, (0.6 / 6 + 0.15 / 2) / 2]
    assert sum(layers) == pytest.approx(whole)
    shares = flow_shares(step, FlowSpec())
    assert shares == pytest.approx([e / whole for e in layers])
    assert shares is not None
    assert entropy(shares) == pytest.approx(scipy.stats.entropy(shares))
    only = flow_shares(step, FlowSpec(("geometry",), (1, 2)))
    assert only == pytest.approx([1 / 3, 2 / 3, 0])
    wide = flow_shares({**step, "flow_direction_per_layer": None}, FlowSpec())
    local = [(g / 3 + p / 2) / 2 for g, p in zip((0.02, 0.04, 0), (0.05, 0.2, 0.15), strict=True)]
    assert wide == pytest.approx([e / sum(local) for e in local])
    assert flow_shares({"flow_direction_per_layer": None}, FlowSpec()) is None
    assert flow_shares({"flow_geometry_per_layer": [0.0, 0.0]}, FlowSpec()) is None


def test_the_page_needs_nothing_else(page: tuple[Path, str]) -> None:
    _, html = page
    parsed = Page(html)
    assert not [
        tag for tag, _ in parsed.tags if tag in ("script", "link", "iframe", "object", "base")
    ]
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                assert value is not None and value.startswith(("#", "data:image/png;base64,"))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    for url in re.findall(r"url\(([^)]*)\)", html):
        assert url.startswith("#"), url
    identifiers = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers)) > 10, "two pictures share a clip path's name"


def test_the_page_has_every_section(page: tuple[Path, str], study: Path) -> None:
    out, html = page
    text = Page(html).text
    for title in (
        "Result", "Cost, and gain for it", "Accuracy over training", "Losses", "Flow by layer",
        "Shares of the layers", "Rollouts and teacher", "Time and memory by phase", "Samples",
        "Runs", "phf: direction", "phf: geometry", "phf: adjacent",
        "Entropy of the teacher", "Clipped by the loss", "Rollouts cut for want of room",
        "Gain for one GPU-hour", "Signs of collapse", "Entropy of the student",
        "Length against the first steps", "Words of the reference in the responses",
        "Agreement of student and teacher",
    ):  # fmt: skip
        assert title in text, title
    assert "Not in these runs: flow terms by layer of opsd." in text
    final = 100 * np.mean([average(study / "phf" / f"seed{s}", -1) for s in (1, 2, 3)])
    assert f"{final:.1f} % [" in text
    before = 100 * np.mean([average(study / "phf" / f"seed{s}", 0) for s in (1, 2, 3)])
    assert f"{before:.1f} %" in text
    assert "What is 1 + 1, and why?" in text and "Before training" in text
    assert "After step 40" in text and "After 0 steps I think" in text
    assert "5.59 GiB" in text and "phf_alpha 0.05" in text
    for name in PHASES:
        assert f">{name}</text>" in html
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == html.count("<figure") > 20
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def rewrite(path: Path, change: Any) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    write_lines(path, lines)


def test_text_from_runs_is_text(page: tuple[Path, str], tmp_path: Path) -> None:
    """A hostile name and hostile generations: shown as they are, no element more."""
    name = HOSTILE.replace("\x00", "")
    run = make_run(tmp_path / "run", name, 1)

    def hostile(line: dict[str, Any]) -> None:
        line["samples"] = [dict.fromkeys(("problem", "reference", "answer", "generation"), HOSTILE)]

    rewrite(run / "evaluations.jsonl", hostile)
    parsed = Page(Path(write_report(read_variants([str(run)]), str(tmp_path / "out"))).read_text())
    assert parsed.text.count("<script>alert(1)</script>") >= 8
    assert parsed.text.count("{{7*7}}") >= 8
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in Page(page[1]).tags}
    assert not [a for _, a in parsed.tags if "onerror" in a]


def test_a_run_may_lack_nearly_everything(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "run.json").write_text('{"run_name": "x", "seed": 0}')
    write_lines(bare / "metrics.jsonl", [{"step": 1}, {"step": 2, "loss": None, "seconds": None}])
    path = write_report(read_variants([str(bare)]), str(tmp_path / "out"))
    text = Page(Path(path).read_text()).text
    for missing in (
        "evaluations", "gain and cost of a run", "loss", "flow terms by layer of x",
        "memory by phase", "time of a step", "samples of x", "rollout length",
    ):  # fmt: skip
        assert missing in text, missing
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text('{"run_name": "x", "seed": 0, "config": null, "model": null}')
    write_report(read_variants([str(empty)]), str(tmp_path / "out2"))


def test_one_step_and_one_layer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "phf", 1)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    line |= {"flow_direction_per_layer": [0.5], "flow_geometry_per_layer": [0.1]}
    line |= {"flow_adjacent_per_pair": None}
    write_lines(run / "metrics.jsonl", [line])
    path = write_report(read_variants([str(run)]), str(tmp_path / "out"))
    assert "100.0 %" in Page(Path(path).read_text()).text


METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        (METRICS, 3, '{"step": 3, "loss": 0.1', "not JSON"),
        (METRICS, 3, '{"step": 3, "loss": NaN}', "not JSON"),
        (METRICS, 3, "[1]", "not a JSON object but list"),
        (METRICS, 2, '{"loss": 0.1}', "field 'step' is None, not a whole number"),
        (METRICS, 2, '{"step": true}', "field 'step' is True, not a whole number"),
        (METRICS, 2, '{"step": 2, "loss": "0.1"}', "field 'loss' is '0.1', not a number"),
        (METRICS, 2, '{"step": 2, "flow_geometry_per_layer": [1, "2"]}', "not a list of numbers"),
        (METRICS, 2, '{"step": 2, "seconds": 3}', "field 'seconds' is 3, not an object of numbers"),
        (EVALUATIONS, 2, '{"step": 2, "correct": [[true], [true, false]]}', "not a list of lists"),
        (EVALUATIONS, 2, '{"step": 2, "interval_95": [1]}', "not two numbers"),
        (EVALUATIONS, 2, '{"step": 2, "samples": [{"problem": 3}]}', "not a list of samples"),
        ("run.json", 0, '{"run_name": "x"', "is not JSON"),
        ("run.json", 0, '{"seed": 1}', "field 'run_name' is None, not a name"),
        ("run.json", 0, '{"run_name": "x\\ud800", "seed": 1}', "not a name"),
        ("run.json", 0, '{"run_name": "x", "seed": "1"}', "field 'seed' is '1', not a whole"),
        ("run.json", 0, '{"run_name": "x", "seed": 1, "config": []}', "field 'config' is"),
        (
            "run.json", 0,
            '{"run_name": "x", "seed": 1, "config": {"method": {"phf_terms": "up"}}}',
            "settings of the flow loss",
        ),
    ],
)  # fmt: skip
def test_damaged_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    line: int,
    text: str,
    message: str,
) -> None:
    """Status 2 and one line that names file and line, and no report."""
    from megatron_phf.cli.report import main

    run = make_run(tmp_path / "run", "phf", 1)
    lines = (run / file).read_text().splitlines()
    content = [text] if file == "run.json" else [*lines[: line - 1], text, *lines[line:]]
    (run / file).write_text("\n".join(content) + "\n")
    assert main([str(run), "--output", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    where = f"{run / file}:{line}: " if line else f"{run / file}: "
    assert error.startswith(f"error: {where}") and message in error
    assert not (tmp_path / "out" / PAGE).exists()


def test_runs_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN .*nothing: no run\.json in or below it"):
        read_variants([str(tmp_path / "nothing")])
    one, two = (make_run(tmp_path / name, "phf", 1) for name in ("one", "two"))
    with pytest.raises(ValueError, match=r"both are 'phf' with seed 1; leave one out"):
        read_variants([str(one), str(two)])
    assert len(read_variants([str(one), str(one / ".")])[0].runs) == 1

    def fewer(line: dict[str, Any]) -> None:
        line["correct"] = line["correct"][:-1]

    three = make_run(tmp_path / "three", "opsd", 1)
    rewrite(three / EVALUATIONS, fewer)
    with pytest.raises(ValueError, match=r"on 23 problems x 4 samples, .* on 24 x 4: no comp"):
        read_variants([str(three), str(one)])
    with pytest.raises(ValueError, match=r"--baseline sft: no run of this name; there are phf"):
        write_report(read_variants([str(one)]), str(tmp_path / "out"), "sft")


def test_variants_come_in_an_order_that_readers_expect(tmp_path: Path) -> None:
    names = "alpha_10", "phf", "alpha_2", "alpha_0.5", "sft", "alpha", "opsd", "７", "½2"
    for i, name in enumerate(names):
        make_run(tmp_path / str(i), name, 1)
    found = [variant.name for variant in read_variants([str(tmp_path)])]
    assert found[:3] == ["sft", "opsd", "phf"] and sorted(found) == sorted(names)
    ordered = ["alpha", "alpha_0.5", "alpha_2", "alpha_10"]
    assert [name for name in found if name in ordered] == ordered


def test_accuracies_stay_between_0_and_1(tmp_path: Path) -> None:
    for seed, final in ((1, 0.05), (2, 0.95)):
        make_run(tmp_path / str(seed), "phf", seed, final=final)
    (variant,) = read_variants([str(tmp_path)])
    value = final_accuracy(variant)
    assert value is not None and (value.low, value.high) == (0.0, 1.0)


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "phf", 1)
    with open(run / METRICS, "a", encoding="utf-8") as f:
        f.write('{"step": 40, "loss": 7.0}\n')
    steps = read_run(str(run)).steps
    assert len(steps) == 40 and steps[-1]["loss"] == 7.0
