"""examples/h100/acceptance.sh on the CPU: what makes sense there runs, and every row can fail."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from megatron_phf.cli import acceptance
from megatron_phf.cli.accept import launch, model, table, verdicts
from megatron_phf.cli.accept.plan import Plan
from megatron_phf.model.architecture import parse_architecture, read_architecture
from tests.launch import REPO, run

SCRIPT = "examples/h100/acceptance.sh"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_on_the_cpu(tmp_path: Path) -> None:
    report = str(tmp_path / "report.json")
    done = run(["bash", SCRIPT, "--gpus", "2", "--json", report], timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines[0] == ["check", "measured", "required", "result"]
    result = {line[0]: (line[1], line[3]) for line in lines[2:]}
    passed = {name for name, (_, word) in result.items() if word == "pass"}
    parity = {f"parity with transformers, {x}" for x in ("bf16", "packed rows", "TP 2", "CP 2")}
    assert passed == parity | {
        "an all-reduce of all GPUs", "losses, bf16 against fp32",
        "losses, resumed after TERM and save",
        "losses, resumed after TERM and asynchronous save",
    }  # fmt: skip
    shown = {name for name, (_, word) in result.items() if word == "shown"}
    decoding = {f"decoding in process, {n} rows{x}" for n in (2, 4) for x in ("", ", LoRA")}
    assert shown == decoding | {
        "a step, 192 tokens", "a step: MFU of the student's pass",
        "a step with the flow loss, over OPSD's", "the head alone, 96 tokens",
        "a step: reserved memory against the formula",
    }  # fmt: skip
    rest = {word for name, (_, word) in result.items() if name not in passed | shown}
    assert rest == {"skipped: needs CUDA and Transformer Engine", "skipped: needs CUDA"}
    assert "nan" not in done.stdout
    rendered = run([sys.executable, "tools/acceptance.py", "--table", report], timeout=300)
    assert rendered.stdout in done.stdout and "| pass |" in rendered.stdout
    times = {case["name"]: case for case in json.loads(Path(report).read_text())["cases"]}
    assert times["decode_4"]["seconds"] > 0 and times["train"]["part"] == "end"
    traces = sorted(path.name for path in (tmp_path / "report_traces").iterdir())
    assert traces == ["step_flow.json.gz", "step_opsd.json.gz"]


def test_dry_run_says_what_would_run() -> None:
    done = run(["bash", SCRIPT, "--dry-run", "--gpus", "2", "--parts", "layouts"], timeout=300)
    assert done.returncode == 0, done.stderr
    *cases, total = done.stdout.splitlines()
    names = [line.split()[1] for line in cases]
    assert names == ["all_reduce", "large", "parity_tp2", "parity_cp2", "graphs_split"]
    assert cases[-1].endswith("skipped: needs CUDA") and "(2 process(es)): --" in cases[0]
    assert total == "at most 1200 s: machine 150 s, write 60 s, layouts 600 s"


def test_the_large_model_is_the_one_that_was_counted(tmp_path: Path) -> None:
    model.write_large(str(tmp_path), "small")

    def arch(size: str):
        settings = {"model_type": "qwen3", **model.settings_of(size), "rope_theta": 1e6}
        return parse_architecture(settings, size)

    assert read_architecture(str(tmp_path)) == arch("small")
    assert arch("1.7B").num_parameters() == 1_720_574_976  # Qwen3-1.7B
    assert arch("8B").num_parameters() == 8_190_735_360  # Qwen3-8B


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


def plan(directory: Path, **changed: object) -> Plan:
    values = {"cuda": True, "engine": None, "vllm": None, "disk": None, "processes": 1, **changed}
    return Plan(
        directory=str(directory), tiny="t", large="m", traces="x", job=["--hf-model", "m"], **values
    )  # fmt: skip


# Losses of ten steps of the tiny job, as they were on a CPU: in fp32, in bf16, and in fp32 with an
# Adam whose step count was lost before every step.
FP32 = [0.00531, 0.02051, 0.01336, 0.01040, 0.00664, 0.00671, 0.00546, 0.00521, 0.00463, 0.00434]
BF16 = [0.00531, 0.02043, 0.01346, 0.01040, 0.00662, 0.00674, 0.00549, 0.00522, 0.00465, 0.00437]
LOST = [0.00531, 0.02051, 0.01813, 0.01363, 0.00975, 0.00880, 0.00609, 0.00600, 0.00545, 0.00507]


def losses(values: list[float]) -> list[dict]:
    return [{"loss": value} for value in values]


GOOD = {
    "step": {"seconds": {"teacher": 0.1, "student": 0.3}, "price": 1.02, "mfu": 0.41,
             "peak_gib": 48.0, "reserved_gib": 52.0, "formula_gib": 50.0, "tokens": 24576},
    "decode_64": {"seconds": 0.002, "tokens_per_second": 32000.0, "memory_seconds": 0.0011,
                  "bandwidth": 3e12, "rows": 64},
    "graphs": {"rows": 8, "tokens": 128, "different": 0},
    "head": {"tokens": 6144, "seconds": {"256": 0.102, "1024": 0.1}},
    "train": losses(FP32),
    "train_bf16": losses(BF16),
    "save_term": losses(FP32[:5]),
    "save_resumed": losses([x * 1.00005 for x in FP32[5:]]),
    "synchronisations": {"phases": {"student": 3}, "places": [["student", "a.py:7", 3]]},
    "vllm_nccl": losses(FP32[:2]),
}  # fmt: skip
NAMES = {
    "MFU": "a step: MFU of the student's pass", "price": "a step with the flow loss, over OPSD's",
    "memory": "a step: reserved memory against the formula",
    "decode": "decoding in process, 64 rows", "graphs": "tokens with graphs = tokens without",
    "head": "the head alone, 6144 tokens", "curve": "losses, bf16 against fp32",
    "resume": "losses, resumed after TERM and save", "vllm": "vLLM, weights by nccl",
}  # fmt: skip


def evaluated(directory: Path, cuda: bool = True, **changed: object) -> dict[str, table.Row]:
    for name, content in {**GOOD, **changed}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    some = plan(directory, processes=8)
    cases = [case for case in some.cases() if case.name in GOOD]
    some = dataclasses.replace(some, cuda=cuda)  # the same cases, where speed says nothing
    return {row.name: row for row in verdicts.evaluate(some, cases, launch.Clock(0.0))}


@pytest.mark.parametrize(
    ("row", "case", "bad"),
    [
        ("MFU", "step", {"mfu": 0.39}),
        ("price", "step", {"price": 1.04}),
        ("memory", "step", {"reserved_gib": 56.0}),
        ("memory", "step", {"reserved_gib": 44.0}),
        ("decode", "decode_64", {"seconds": 0.0023}),
        ("head", "head", {"seconds": {"256": 0.12, "1024": 0.1}}),
        ("graphs", "graphs", {"different": 1}),
        ("curve", "train_bf16", losses(LOST)),
        ("curve", "train_bf16", losses(BF16[:9])),
        ("resume", "save_resumed", losses([x * 1.0002 for x in FP32[5:]])),
        ("resume", "save_resumed", losses(FP32)),  # it started anew
    ],
)
def test_verdicts(row: str, case: str, bad: object, tmp_path: Path) -> None:
    good = evaluated(tmp_path)
    assert {good[name].result for name in NAMES.values()} == {"pass"}
    change = {**GOOD[case], **bad} if isinstance(bad, dict) else bad
    failed = {
        name for name, r in evaluated(tmp_path, **{case: change}).items() if r.result == "fail"
    }
    judged = {verdict for verdict, name in NAMES.items() if name in failed}
    assert judged == {row} and len(failed) == 1
    speed = row in ("MFU", "price", "memory", "decode", "head")
    on_cpu = evaluated(tmp_path, cuda=False, **{case: change})
    assert on_cpu[NAMES[row]].result == ("shown" if speed else "fail")


def test_an_unknown_gpu_has_no_verdict(tmp_path: Path) -> None:
    rows = evaluated(tmp_path, step={**GOOD["step"], "mfu": None})
    assert rows[NAMES["MFU"]].result == "shown"


@pytest.mark.parametrize(
    ("problem", "result"),
    [
        ("ValueError: --vllm-launch: the server has ended", "pass"),
        ("ended after 60 s", "fail"),  # it hung
        ("RuntimeError: ncclInternalError", "fail"),
        (None, "fail"),  # nobody missed it
    ],
)
def test_a_server_that_dies_is_named(problem: str | None, result: str, tmp_path: Path) -> None:
    some = plan(tmp_path, processes=8)
    cases = [case for case in some.cases() if case.name == "vllm_killed"]
    clock = launch.Clock(0.0, {} if problem is None else {"vllm_killed": problem})
    if problem is None:
        (tmp_path / "vllm_killed.json").write_text(json.dumps(losses([1.0, 1.0])))
    (row,) = verdicts.evaluate(some, cases, clock)
    assert row.result == result


def test_failures_come_first_and_a_report_is_the_table(tmp_path: Path) -> None:
    every = plan(tmp_path, engine="Transformer Engine")
    clock = launch.Clock(0.0, {"parity_bf16": "no\nsuch kernel", "decode_8": launch.LATE})
    for name, content in GOOD.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = verdicts.evaluate(every, every.cases(), clock)
    results = [row.result for row in table.ordered(found)]
    assert results == sorted(results, key=list(table.RESULTS).index)
    lines = table.table(found).splitlines()
    assert lines[2] == (
        "| parity with transformers, bf16 | parity_bf16: no such kernel |  | **FAIL** |"
    )
    assert "| decoding in process, 8 rows |  |  | not run: out of time |" in lines
    assert "| host waits for the GPU in a step | student 3; a.py:7 3 times |  | shown |" in lines
    assert sum("skipped: needs Transformer Engine" in line for line in lines) == 5
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
    clock, some = launch.Clock(0.0, {"large": "No space left on device"}), plan(tmp_path)
    found = {row.name: row for row in verdicts.evaluate(some, some.cases(), clock)}
    assert found["decoding in process, 8 rows"].measured == "large: No space left on device"
    assert found["parity with transformers, bf16"].result == "late"


@pytest.mark.parametrize("missing", ["cc", "Python.h"])
def test_a_machine_on_which_triton_cannot_build(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance.shutil, "which", lambda name: missing != "cc" and name)
    (tmp_path / "Python.h").touch()
    if missing == "Python.h":
        (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(acceptance.sysconfig, "get_path", lambda name: str(tmp_path))
    acceptance.check_machine(cuda=False)
    with pytest.raises(ValueError, match="which triton needs at run time"):
        acceptance.check_machine(cuda=True)


def test_the_page_has_the_tables_of_the_reports() -> None:
    """docs/gpu.md's numbers are those of benchmarks/results/acceptance_*.json."""
    page = (REPO / "docs/gpu.md").read_text()
    reports = sorted((REPO / "benchmarks/results").glob("acceptance_*.json"))
    begin, end = "<!-- acceptance -->\n", "<!-- /acceptance -->"
    written = page.partition(begin)[2].partition(end)[0].strip()
    tables = "\n\n".join(table.render(str(path)) for path in reports)
    assert written == (tables or "No GPU has run it yet.")


@pytest.mark.parametrize("given", [["model"], ["--gpus", "3"], ["--parts", "no"]])
def test_mistakes(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        acceptance.main(given)
