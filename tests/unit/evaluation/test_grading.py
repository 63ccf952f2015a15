"""Graders: equal values in other spellings, hostile generations, functions that hang or crash."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_phf.data.problems import Problem, read_problems
from megatron_phf.data.prompts import PromptTemplates, fill, load_template
from megatron_phf.evaluation.grading import (
    Grader,
    canonical_answer,
    check_grader,
    is_correct,
    make_grader,
)
from tests.launch import REPO

TASKS = REPO / "examples/tasks"

# Each function meets the same grader; "fine" after it must find a process that works.
PLUG_IN = """
import os, signal, subprocess, sys, time
import numpy as np
from megatron_phf.data.problems import Problem

def grade(generation: str, problem: Problem) -> bool:
    print("a line on stdout, which is no reply")
    if generation == "fine":
        return problem.answer == "7"
    if generation == "wrong":
        return False
    if generation == "raise":
        raise RuntimeError("no idea")
    if generation == "recursion":
        return grade(generation, problem)
    if generation == "exit":
        sys.exit(0)
    if generation == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if generation == "memory":
        return len([np.zeros(1 << 27) for _ in range(64)]) > 0  # 64 GiB that nobody touches
    if generation == "hang":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(1000)
    if generation == "sleep":
        time.sleep(1000)
    if generation == "children":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e3)  # plug-in's child"])
        os._exit(3)
    if generation == "word":
        return "yes"
"""


def problem(answer: str | None) -> Problem:
    return Problem("q", "s", answer, 4)


def processes() -> set[int]:
    """This test's own children, and what a plug-in left behind on the machine."""
    left = psutil.process_iter(["cmdline"])
    mine = {p.pid for p in left if "plug-in's child" in " ".join(p.info["cmdline"] or ())}
    return mine | {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def math() -> Iterator[Grader]:
    with make_grader("math", timeout=20.0) as grader:
        yield grader


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        (r"\frac{\pi}{4}", r"\arctan(1)"),
        (r"2\sqrt{3}", r"$\sqrt{12}$"),
        (r"x^2+2x+1", "(x+1)^2"),
        (r"10^{6}", "1000000"),
        (r"\{2, 1\}", "1,2"),
        (r"1\frac{1}{2}", "3/2"),
        ("−3", "-3"),
        ("７２", "72"),
        (r"90^\circ", "90"),
        (r"x = 5", "5"),
        (r"\dfrac{\frac{1}{2}}{2}", "0.25"),
        ("070", "70"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\text{Blue}", r"\text{Blue}"),
    ],
)
def test_equal_values(math: Grader, box: str, answer: str) -> None:
    assert math.correct(f"So it is $\\boxed{{{box}}}$, done.", problem(answer))
    assert math.correct(f"thus\n#### {box}\n", problem(answer))


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("1,2,3", "3"),
        (r"1\frac{1}{2}", "5.5"),
        ("1 1/2", "5.5"),
        ("(1,2)", "(2,1)"),
        (r"3 \text{ or } 5", "3"),
        ("0.333", "1/3"),
        ("x", "3"),
        ("", "3"),
        (r"\text{blue}", "red"),
        ("[0,1)", "[0,1]"),
        ("__import__('os').system('true')", "0"),
    ],
)
def test_other_values(math: Grader, box: str, answer: str) -> None:
    assert not math.correct(f"\\boxed{{{box}}}", problem(answer))


def test_the_last_of_several_boxes_counts(math: Grader) -> None:
    assert math.correct(r"\boxed{1}, no: \boxed{\sqrt{4}}", problem("2"))
    assert not math.correct(r"\boxed{\sqrt{4}}, no: \boxed{1}", problem("2"))
    assert not math.correct(r"\boxed{\sqrt{4}", problem("2"))


HOSTILE = (
    "\\boxed{" + "{" * 10**6,
    "\\boxed{" + "{" * 10**6 + "}" * 10**6 + "}",
    "\\boxed{" * 10**5 + "1" + "}" * 10**5,
    "\\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
    "\\boxed{" + "\\frac{1}{" * 200 + "2" + "}" * 200 + "}",
    "\\boxed{" + "(" * 1990 + "}",
    "\\boxed{\x00\ud800\u202e}",
    "\\boxed{" + "9" * 1990 + "}",
    r"\boxed{\int_0^{}\sum \frac{}{} }",
    r"\boxed{10^{10^{10}}!}",
)


def test_hostile_generations() -> None:
    """None means 2: each gets its verdict within the time limit, and the grader still works."""
    with make_grader("math", timeout=1.5) as grader:
        for generation in HOSTILE:
            assert not grader.correct(generation, problem("2"))
            assert grader.correct(r"\boxed{\sqrt{4}}", problem("2"))


def test_what_never_ends_is_one_wrong_answer(caplog: pytest.LogCaptureFixture) -> None:
    powers, series = r"\boxed{9^{9^{9^9}}}", r"\boxed{\sum_{n=1}^{\infty} \frac{\sin(n^2)}{n^3}}"
    with make_grader("math", timeout=1.5) as grader, caplog.at_level(logging.WARNING):
        for endless in (powers, series, powers):
            assert not grader.correct(endless, problem(r"\frac{\pi^2}{7}"))
        assert grader.correct(r"\boxed{\sqrt{4}}", problem("2"))
    # The verdict on what repeats is remembered.
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all("problem 4" in line for line in lines)
    assert all("no verdict within 1.5 s" in line for line in lines), lines


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_task.py").write_text(PLUG_IN)
    (tmp_path / "broken_task.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_task:grade"


def test_a_plug_in_that_fails_costs_one_answer(
    plug_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = {
        "raise": "RuntimeError: 'no idea'",
        "recursion": "RecursionError",
        "exit": "it ended (status 0)",
        "segfault": "it ended (status -11)",
        "memory": "out of memory",
        "hang": "no verdict within 1 s",
        "children": "it ended (status 3)",
        "word": "returned str, not bool",
    }
    before = processes()
    with make_grader(plug_in, timeout=1.0) as grader, caplog.at_level(logging.WARNING):
        for generation, reason in reasons.items():
            caplog.clear()
            assert not grader.correct(generation, problem("7"))
            (record,) = caplog.records
            assert reason in record.getMessage() and "problem 4" in record.getMessage()
            assert grader.correct("fine", problem("7"))
        caplog.clear()
        assert not grader.correct("wrong", problem("7"))
        assert not grader.correct("fine", problem(None))
        assert not caplog.records
    assert processes() == before


def test_a_grader_ends_with_its_context(plug_in: str) -> None:
    before = processes()
    with make_grader(plug_in) as grader:
        assert grader.correct("fine", problem("7"))
        (child,) = processes() - before
        os.kill(child, signal.SIGKILL)  # by the kernel, for instance, between two answers
        psutil.wait_procs([psutil.Process(child)], timeout=60)
        assert grader.correct("fine", problem("7"))
    assert processes() == before


def test_a_grader_does_not_outlive_a_killed_rank(plug_in: str, tmp_path: Path) -> None:
    """Nobody is left to end the function that hangs: it ends by itself."""
    script = (
        "from megatron_phf.evaluation.grading import make_grader\n"
        "from megatron_phf.data.problems import Problem\n"
        "with make_grader('my_task:grade', timeout=1.0) as grader:\n"
        "    assert grader.correct('fine', Problem('', '', '7', 0))\n"
        "    print('ready', flush=True)\n"
        "    grader.correct('sleep', Problem('', '', '7', 0))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == b"ready\n"
        (worker,) = psutil.Process(rank.pid).children()
        time.sleep(0.3)
        rank.kill()
    assert worker.is_running()
    _, alive = psutil.wait_procs([worker], timeout=60)
    assert not alive


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "need math, exact or package.module:function"),
        ("a b:c", "need math, exact or package.module:function"),
        ("os:", "need math, exact or package.module:function"),
        ("no_such_task:grade", "No module named 'no_such_task'"),
        ("broken_task:grade", "No module named 'no_such_module'"),
        ("my_task:other", "has no attribute 'other'"),
        ("my_task:os", "os of my_task is no function"),
    ],
)
def test_specs_that_name_no_grader(plug_in: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--grader {spec}: .*{message}"), make_grader(spec):
        pass


def test_check_grader() -> None:
    for spec in ("math", "exact", "task:grade", "a.b.c:d"):
        check_grader(spec)


def test_exact_needs_no_process() -> None:
    before = processes()
    with make_grader("exact") as grader:
        assert grader.correct(r"\boxed{1,234}", problem("1234"))
        assert not grader.correct(r"\boxed{\sqrt{4}}", problem("2"))
    with make_grader("math") as grader:  # the fast path too
        assert grader.correct(r"\boxed{1,234}", problem("1234"))
        assert not grader.correct("no box", problem("1234"))
        assert processes() == before


def test_canonical_answers() -> None:
    one = {canonical_answer(f"\\boxed{{{x}}}") for x in (r"\frac{1}{2}", "0.5", "1/2", "$.5$")}
    assert one == {"1/2"}
    assert canonical_answer(r"\boxed{-\frac{6}{4}}") == "-3/2"
    assert canonical_answer("#### 1,000 ") == "1000"
    assert canonical_answer(r"\boxed{\text{blue}}.") == "blue"
    assert canonical_answer("no answer") is None
    assert canonical_answer("\\boxed{" + "1" * 10**5 + "}") is None


def test_the_string_match_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TASKS))
    problems = read_problems(str(TASKS / "string_match.jsonl"))
    templates = PromptTemplates(
        *(
            load_template(str(TASKS / f"string_match_{side}.txt"), f"--{side}-template")
            for side in ("student", "teacher")
        )
    )
    with make_grader("string_match:same_text") as grader:
        for each in problems:
            assert each.problem in fill(templates.student, each)
            assert each.solution in fill(templates.teacher, each)
            assert grader.correct(each.solution, each)
            assert grader.correct(f"Answer: none\nANSWER:  {each.answer}. ", each)
            assert not grader.correct(f"{each.answer}", each)
            assert not grader.correct(f"Answer: {each.answer}\nAnswer: none", each)


def test_plug_ins_are_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.py").write_text("def grade(generation, problem):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    with make_grader("here:grade") as grader:
        assert grader.correct("", problem(None))


def test_is_correct_still_reads_fractions() -> None:
    assert is_correct(r"\boxed{-\frac{1}{2}}", "-0.5")
    assert is_correct(r"\boxed{3 / 4}", "0.75")
    assert is_correct(r"\boxed{12 345}", "12345")
