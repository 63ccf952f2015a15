"""examples/h100/acceptance.sh on the CPU: what makes sense there runs, and every row can fail."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from megatron_phf.cli import acceptance, preflight
from megatron_phf.cli.accept import launch, model, table, verdicts
from megatron_phf.cli.accept.plan import LAYOUTS, Plan
from megatron_phf.config.flags import parse_args
from megatron_phf.model.architecture import parse_architecture, read_architecture
from megatron_phf.runtime import device
from tests.launch import REPO, run
from tests.models import make_replay

SCRIPT = "examples/h100/acceptance.sh"
ENGINE_CASES = {"parity_te", "parity_fp8", "train_fp8", "step_te", "decode_te", "step_fp8"}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_on_the_cpu(tmp_path: Path) -> None:
    report = str(tmp_path / "report.json")
    done = run(["bash", SCRIPT, "--json", report], timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines[0] == ["check", "measured", "required", "result"]
    result = {line[0]: (line[1], line[3]) for line in lines[2:]}
    passed = {name for name, (_, word) in result.items() if word == "pass"}
    assert passed == {
        "parity with transformers, fp32", "parity with transformers, bf16",
        "parity with transformers, packed rows", "loss over 4 steps, bf16 against fp32",
        "losses of 2 steps resumed from a save",
        "losses of 2 steps resumed from an asynchronous save",
    }  # fmt: skip
    shown = {name for name, (_, word) in result.items() if word == "shown"}
    assert shown == {
        "a step of 128 tokens", "MFU of the student's pass",
        "a step with the flow loss, over OPSD's", "peak memory against the formula",
        "decoding in process, 4 rows",
    }  # fmt: skip
    rest = {word for name, (_, word) in result.items() if name not in passed | shown}
    assert rest == {"skipped: needs CUDA and Transformer Engine", "skipped: needs CUDA",
                    "skipped: needs several GPUs", "skipped: needs CUDA graphs"}  # fmt: skip
    assert float(result["decoding in process, 4 rows"][0].split()[0]) > 0
    assert "nan" not in done.stdout
    rendered = run([sys.executable, "tools/acceptance.py", "--table", report], timeout=300)
    assert rendered.stdout in done.stdout and "| pass |" in rendered.stdout
    times = {case["name"]: case for case in json.loads(Path(report).read_text())["cases"]}
    assert 0 < times["decode"]["seconds"] < times["decode"]["limit"]


def test_dry_run_says_what_would_run() -> None:
    done = run(["bash", SCRIPT, "--dry-run", "--gpus", "8"], timeout=300)
    assert done.returncode == 0, done.stderr
    *cases, skipped, total = done.stdout.splitlines()
    names = [line.split()[0] for line in cases]
    assert names == ["parity_fp32", "parity_bf16", "parity_packed", "train", "train_bf16",
                     "save_half", "save_resumed", "async_save_half", "async_save_resumed", "step",
                     "synchronisations", "decode"]  # fmt: skip
    assert "(8 process(es), expected 5 s" in done.stdout and "--overlap-grad-reduce" in done.stdout
    assert skipped == "skipped: what needs CUDA and Transformer Engine"
    assert total.endswith(" s on an H100 of 600 s at most")


def large(cuda: bool = True):
    settings = {"model_type": "qwen3", **model.large_settings(cuda), "rope_theta": 1e6}
    return parse_architecture(settings, "large")


def plan(directory: Path, cuda: bool = True, engine: str | None = None, processes: int = 1) -> Plan:
    return Plan(
        directory=str(directory), tiny="t", large="m", arch=large(), cuda=cuda, engine=engine,
        processes=processes, steps=50, job=["--hf-model", "m", "--data", "d"],
    )  # fmt: skip


def test_the_large_model_is_the_one_that_was_counted(tmp_path: Path) -> None:
    model.write_large(str(tmp_path), cuda=False)
    assert read_architecture(str(tmp_path)) == large(cuda=False)
    assert large().num_parameters() == 1_720_574_976  # Qwen3-1.7B


@pytest.mark.parametrize("engine", [None, "Transformer Engine"])
def test_it_fits_ten_minutes_of_an_h100(tmp_path: Path, engine: str | None) -> None:
    whole = plan(tmp_path, engine=engine)
    assert 100 < whole.expected_seconds() < 0.8 * 600
    assert all(60 < case.limit < 300 for case in whole.cases())
    names = {case.name for case in whole.cases()}
    assert ENGINE_CASES & names == (ENGINE_CASES if engine is None else set())


def test_without_transformer_engine_all_else_is_local_and_in_bf16(tmp_path: Path) -> None:
    """Its rows are skipped, not failed; no other case asks for it."""
    bare = plan(tmp_path, engine="Transformer Engine", processes=8)
    for case in bare.cases():
        assert "local" in case.argv and "transformer_engine" not in case.argv
    found = verdicts.evaluate(bare, launch.Clock(0.0))
    skipped = [row.name for row in found if row.why == "needs Transformer Engine"]
    assert skipped == [
        "parity with transformers, Transformer Engine", "parity with transformers, userbuffers",
        "parity with transformers, FP8", "loss, FP8 against bf16",
        "a step: time, MFU, price, memory, Transformer Engine",
        "decoding in process, Transformer Engine", "a step: time, MFU, price, memory, FP8",
    ]  # fmt: skip
    assert "step" in {c.name for c in bare.cases() if c.argv[c.argv.index("--dtype") + 1] == "bf16"}


@pytest.mark.parametrize("code", ["raise ImportError('libcudnn.so.9: no such file')", "x = 1"])
def test_transformer_engine_is_tried_not_looked_up(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package may lie there without its extension."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problem = acceptance.engine_problem(cuda=True)
    said = "Transformer Engine (ImportError: libcudnn.so.9: no such file)"
    assert problem == (said if "raise" in code else None)
    assert acceptance.engine_problem(cuda=False) == "CUDA and Transformer Engine"


def test_packed_rows_are_cut_over_gpus(tmp_path: Path) -> None:
    """On two GPUs or more, with flags that the checks before launch take."""
    more = plan(tmp_path, processes=8)
    argv = {case.name: case.argv for case in more.cases()}["parity_context"]
    config = parse_args(argv)
    assert config.batching.pack_sequences and config.parallel.context_parallel_size == 2
    preflight.check_world_size(config, 8)
    preflight._check_batching(config)
    assert more.layout == LAYOUTS[8]


GOOD = {
    "step": {"seconds": {"teacher": 0.1, "student": 0.3}, "price": 1.02, "mfu": 0.41,
             "peak_gib": 52.0, "formula_gib": 50.0, "tokens": 9216},
    "decode": {"seconds": 0.002, "tokens_per_second": 32000.0, "memory_seconds": 0.0011,
               "bandwidth": 3e12, "rows": 64, "graphs_equal": True},
    "train": [{"loss": 1.0}] * 4,
    "train_bf16": [{"loss": 1.04}] * 4,
    "save_resumed": [{"loss": 1.00005}] * 2,
    "synchronisations": {"phases": {"student": 3}, "places": [["student", "a.py:7", 3]]},
}  # fmt: skip


def evaluated(directory: Path, cuda: bool, **changed: object) -> dict[str, table.Row]:
    for name, content in {**GOOD, **changed}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    some = plan(directory, cuda)
    found = [*verdicts.step_rows(some, ""), *verdicts.decode_row(some, "")]
    found += [verdicts.curve_row(some, "train_bf16", "train"), verdicts.resume_row(some, "save")]
    return {row.name.split(" of ")[0].split(",")[0]: row for row in found}


@pytest.mark.parametrize(
    ("row", "case", "bad"),
    [
        ("MFU", "step", {"mfu": 0.39}),
        ("a step with the flow loss", "step", {"price": 1.04}),
        ("peak memory against the formula", "step", {"peak_gib": 56.0}),
        ("peak memory against the formula", "step", {"peak_gib": 44.0}),
        ("decoding in process", "decode", {"seconds": 0.0023}),
        ("tokens with CUDA graphs and without", "decode", {"graphs_equal": False}),
        ("loss over 4 steps", "train_bf16", [{"loss": 1.06}] * 4),
        ("losses", "save_resumed", [{"loss": 1.0002}] * 2),
        ("losses", "save_resumed", [{"loss": 1.0}] * 4),  # it started anew
    ],
)
def test_verdicts(row: str, case: str, bad: object, tmp_path: Path) -> None:
    assert evaluated(tmp_path, cuda=True)[row].result == "pass"
    change = {**GOOD[case], **bad} if isinstance(bad, dict) else bad
    found = evaluated(tmp_path, cuda=True, **{case: change})
    assert {name for name, r in found.items() if r.result == "fail"} == {row}
    on_cpu = evaluated(tmp_path, cuda=False, **{case: change})
    judged = isinstance(bad, list) or "graphs_equal" in bad
    assert on_cpu[row].result == ("fail" if judged else "shown")


def test_a_small_model_or_an_unknown_gpu_has_no_verdict(tmp_path: Path) -> None:
    assert (
        evaluated(tmp_path, cuda=True, step={**GOOD["step"], "mfu": None})["MFU"].result == "shown"
    )
    small = dataclasses.replace(plan(tmp_path), arch=large(cuda=False))
    assert {row.result for row in verdicts.step_rows(small, "")} == {"shown"}


def test_failures_come_first_and_a_report_is_the_table(tmp_path: Path) -> None:
    every = plan(tmp_path, engine="Transformer Engine")
    clock = launch.Clock(0.0, {"parity_fp32": "no\nsuch kernel", "decode": launch.LATE})
    for name, content in GOOD.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = verdicts.evaluate(every, clock)
    results = [row.result for row in table.ordered(found)]
    assert results == sorted(results, key=list(table.RESULTS).index)
    lines = table.table(found).splitlines()
    assert lines[2] == (
        "| parity with transformers, fp32 | parity_fp32: no such kernel |  | **FAIL** |"
    )
    assert "| decoding in process |  |  | not run: out of time |" in lines
    assert "| host waits for the GPU in a step | student 3; a.py:7 3 times |  | shown |" in lines
    path = str(tmp_path / "runs" / "report.json")
    machine = {"device": "NVIDIA H100", "processes": 1, "model": "m", "versions": {"torch": "2.11"}}
    table.write_report(path, {**machine, "seconds": 300.0}, found, [])
    assert table.render(path) == (
        "NVIDIA H100; 1 process(es); m; torch 2.11; 300 s\n\n" + table.table(found)
    )
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not a report"):
        table.render(str(tmp_path / "other.json"))


def test_the_large_model_that_could_not_be_written_is_the_reason(tmp_path: Path) -> None:
    clock = launch.Clock(0.0, {"large": "No space left on device"})
    found = {row.name: row for row in verdicts.evaluate(plan(tmp_path, engine="x"), clock)}
    assert found["decoding in process"].measured == "large: No space left on device"
    assert found["parity with transformers, fp32"].result == "late"


def test_the_page_has_the_tables_of_the_reports() -> None:
    """docs/gpu.md's numbers are those of benchmarks/results/acceptance_*.json."""
    page = (REPO / "docs/gpu.md").read_text()
    reports = sorted((REPO / "benchmarks/results").glob("acceptance_*.json"))
    begin, end = "<!-- acceptance -->\n", "<!-- /acceptance -->"
    written = page.partition(begin)[2].partition(end)[0].strip()
    tables = "\n\n".join(table.render(str(path)) for path in reports)
    assert written == (tables or "No GPU has run it yet.")


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("gpus", sorted(LAYOUTS))
def test_every_case_passes_its_own_checks(
    gpus: int, cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of GPUs: before launch, and in each rank."""
    monkeypatch.setattr(device, "has_cuda", lambda: cuda)
    monkeypatch.setattr(preflight, "check_gpu", lambda config: None)  # there is none here
    monkeypatch.setattr(preflight, "check_fp8_model", lambda config, arch: None)
    monkeypatch.setattr(acceptance, "engine_problem", lambda cuda: None if cuda else "CUDA")
    whole = acceptance.make_plan(acceptance.parse(["--gpus", str(gpus)]), str(tmp_path))
    # Its weights are not written: what reads their headers is another test's.
    monkeypatch.setattr(preflight, "_check_weights", lambda models, config: None)
    model.write_large(whole.large, cuda=False)
    make_replay(str(tmp_path / "rollouts.jsonl"), [3] * 160, vocab_size=20)
    for case in whole.cases():
        config = parse_args(case.argv)
        if case.settings and gpus == 8 and case.kind != "decode":
            continue  # two layers in place of 28
        preflight.check(config)
        preflight.check_world_size(config, gpus)
        assert case.kind != "decode" or config.parallel.pipeline_model_parallel_size == 1


@pytest.mark.parametrize("given", [["model"], ["--gpus", "3"], ["--steps", "2"]])
def test_mistakes(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        acceptance.main(given)
