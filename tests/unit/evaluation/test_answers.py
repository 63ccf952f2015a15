r"""Answers that are equal and answers that are not, both ways round, by each grader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from math_verify import parse, verify

from megatron_phf.data.problems import Problem
from megatron_phf.evaluation.answers import canonical_answer, extract_answer, is_correct
from megatron_phf.evaluation.evaluate import majority
from megatron_phf.evaluation.grading import Grader, make_grader

# Equal for both graders: as text, as exact numbers, or as lists of them.
EQUAL = [
    # as JSON and programs write numbers
    ("0.00001", "1e-05"), ("1e-05", r"10^{-5}"), ("1E5", "100000"), ("1.5e+3", "1500"),
    ("5e-324", "0." + "0" * 323 + "5"), (r"5\times10^{-5}", "0.00005"), (r"5 \cdot 10^3", "5000"),
    ("2.5×10^-3", "0.0025"), ("-10^{2}", "-1e2"), ("1.0", "1"), ("5.", "5"), (".5", "0.5"),
    ("+5", "5"), ("-0", "0"), ("007", "7"), ("1e400", "1" + "0" * 400), ("3.50", "3.5"),
    # fractions
    (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), (r"\tfrac{3}4", ".75"),
    ("-1/2", r"\frac{-1}{2}"),
    (r"-\frac{6}{4}", "-1.5"), (r"1\frac{1}{2}", "3/2"), ("1 1/2", "1.5"), ("5½", "5.5"),
    (r"\frac{1}{10^{10}}", "1e-10"), (r"\dfrac{\frac{1}{2}}{2}", "0.25"), ("3 / 4", "0.75"),
    (r"0.1\overline{6}", r"\frac{1}{6}"), (r"0.\overline{3}", "1/3"), (r"-1.\bar{9}", "-2"),
    (r"0.\dot{6}", "2/3"), (r"0.\overline{142857}", "1/7"),
    # signs, spaces, thousands
    ("–x", "-x"), ("–5", "-5"), ("−5", "-5"), ("‑5", "-5"), ("- 5", "-5"),
    ("–0.5", r"-\frac{1}{2}"),
    (r"1\;024", "1024"), (r"1\,024", "1024"), (r"1\ 024", "1024"), ("1~024", "1024"),
    (r"1\:024", "1,024"), ("1\u202f024", "1024"), ("12{,}345", "12345"), (r"1,\!234", "1234"),
    ("12 345", "12345"), ("1,234,567.5", "1234567.5"), (r"\$1,234", "1234"), ("1,234", "1234"),
    # degrees and percent
    ("30°", "30"), (r"30\degree", "30"), (r"30^\circ", "30"), (r"30^{\circ}", "30°"),
    (r"30\textdegree", r"30\degree"), ("30 degrees", "30"), ("50%", "50"), (r"50\%", "0.5"),
    # lists
    ("100,200,300", "100, 200, 300"), ("100,200,300", "100200300"), ("(1, 2)", "(1,2)"),
    (r"\left(1,\,2\right)", "(1,2)"), ("(1,234)", "(1, 234)"), ("(0.5,3)", r"(\frac{1}{2}, 3)"),
    ("1,2,3", "1, 2, 3"), ("[0,1)", "[0, 1)"),
    # dress
    (r"\approx 3.14", "3.14"), ("≈3.14", "3.14"), ("= 5", "5"), (r"\mathbf{5}", "5"),
    ("**5**", "5"), (r"{\bf 5}", "5"), (r"\boldsymbol{5}", "5"),
    (r"\textbf{\text{blue}}", "blue"), ("(5)", "5"),
    (r"\displaystyle\frac{1}{2}", "0.5"), (r"\(5\)", "5"), (r"\boxed{5}", "5"), ("$5$", "5"),
    (r"\text{Blue}", "Blue"), ("x > 3", "x>3"), (r"5\,\text{cm}", "5 cm"), ("７２", "72"),
    (r"1\;024\pi", r"1024 \pi"),
]  # fmt: skip

# Equal by their value alone: for math-verify.
BY_VALUE = [
    (r"2\sqrt{3}", r"\sqrt{12}"), ("x = 5", "5"), (r"x \approx 3.14", "3.14"),
    (r"\pi", "3.141593"),
    ("x^2+2x+1", "(x+1)^2"), (r"–\sqrt{4}", "-2"),
    (r"\sqrt{2}\cdot 10^{-8}", r"\frac{\sqrt{2}}{10^8}"),
    (r"\log_{10} 1e-05", "-5"),
]  # fmt: skip

OTHER = [
    ("1e-10", "2e-10"), ("0.0000001", "0.0000002"), ("1/10000000", "2/10000000"),
    ("0.1234567", "0.1234568"), ("1000000.0000001", "1000000.0000002"), ("1e-05", "1e-06"),
    ("1e-05", "-5"), ("0.333", "1/3"), (r"0.\overline{3}", "0.3333333"), ("1e5", "1e6"),
    (r"10^{-8}\pi", r"2\cdot10^{-8}\pi"), (r"\frac{\pi}{10^8}", "0.00000005"),
    ("123456789012345678901", "123456789012345678902"), (r"\sqrt{2}", "1.41"),
    ("(1,234)", "(1234)"), ("(1,234)", "1234"), ("(1,234,5)", "(1234,5)"), ("1,234,5", "1234,5"),
    ("[1,234]", "1234"), (r"\{1,234\}", "1234"), ("(1,234)", "1,234"), ("1, 234, 5", "1234, 5"),
    ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("1,2,3", "3"), ("1,2,3", "1,2"), ("1,5", "1.5"),
    ("100,200,300", "100, 200, 301"), (r"\{0.00000001, 1\}", r"\{0.00000002, 1\}"),
    ("1 1/2", "5.5"), ("1 1/2", "11/2"), (r"1\;2", "12"), ("1,2345", "12345"), ("3–5", "-2"),
    ("30°", "30%"), ("30°", "31"), ("50%", "5"), ("5", "-5"), ("–5", "5"),
    (r"30^\circ", r"\frac{\pi}{6}"),
    (r"\text{blue}", "red"), ("0.333...", "0.333"), (r"\frac{1}{0}", "0"), ("1_000", "1000"),
    ("1e5", "15"), (r"3 \text{ or } 5", "3"), ("", "0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def math() -> Iterator[Grader]:
    with make_grader("math", timeout=20.0) as grader:
        yield grader


def verdicts(math: Grader, one: str, other: str) -> list[tuple[bool, bool]]:
    """(exact, math), both ways round."""
    pairs = ((f"So $\\boxed{{{a}}}$.", b) for a, b in ((one, other), (other, one)))
    return [(is_correct(a, b), math.correct(a, Problem("", "", b, 0))) for a, b in pairs]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_as_text_number_or_list(math: Grader, one: str, other: str) -> None:
    assert verdicts(math, one, other) == [(True, True)] * 2


@pytest.mark.parametrize(("one", "other"), BY_VALUE)
def test_equal_by_value(math: Grader, one: str, other: str) -> None:
    assert verdicts(math, one, other) == [(False, True)] * 2


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_not_equal(math: Grader, one: str, other: str) -> None:
    assert verdicts(math, one, other) == [(False, False)] * 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{5}", "5"), (r"\boxed {5}", "5"), ("\\boxed\n{5}", "5"), (r"\fbox{5}", "5"),
        (r"so \boxed 5.", "5"), (r"$\boxed5$", "5"), (r"(\boxed -3/4)", "-3/4"),
        (r"\boxed 1,234 in all", "1,234"), (r"\boxed{1}, no: \boxed 2", "2"),
        (r"\boxed 1, no: \fbox{2}", "2"), (r"\boxed B", "B"), (r"\boxed (1,2)", "(1,2)"),
        (r"\boxed{5} within \boxed{}, as asked", "5"), (r"\boxed{5}, in \boxed form", "5"),
        (r"\boxed{}", ""), (r"\boxed{\boxed{5}}", "5"), (r"\fbox{\boxed{a}}", "a"),
        (r"**\boxed{5}**", "5"), (r"\boxed{\textbf{5}}", r"\textbf{5}"), (r"\boxedness{5}", None),
        (r"\boxed{\frac{1}{2}} \boxed{3", r"\frac{1}{2}"), ("#### 7 ", "7"), ("7", None),
    ],
)  # fmt: skip
def test_where_the_answer_stands(text: str, found: str | None) -> None:
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, so \boxed{\left\{ x=1 \right.}", r"\left\{ x=1 \right."),
        (r"\boxed{\{1,2}", r"\{1,2"),
        (r"\boxed{\left.\frac{1}{2}\right\}}", r"\left.\frac{1}{2}\right\}"),
        (r"\boxed{\begin{cases} 1 \\{2} \end{cases}}", r"\begin{cases} 1 \\{2} \end{cases}"),
        (r"\boxed{5}. Fill in \boxed{ }", "5"), (r"\boxed{5} \boxed{\ }", "5"),
        (r"\boxed{5} \boxed{~}", "5"), (r"\boxed{5} \boxed{\quad}", "5"),
        (r"\boxed{5} \boxed{\text{ }}", "5"), (r"\boxed{5} $\boxed{$ $}$", "5"),
        (r"\boxed{5} \boxed{{}}", "5"), (r"\boxed{5} \boxed{\boxed{ }}", "5"),
        ("\\boxed{5} \\fbox{\n}", "5"), (r"\boxed{ } then \boxed{x}", "x"),
    ],
)  # fmt: skip
def test_braces_without_a_mate_and_empty_boxes(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def _pairs() -> list[list[str]]:
    lines = Path(__file__).with_name("pairs.txt").read_text("utf-8").splitlines()
    return [line.split(" ~ ") for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(("one", "other", "verdict", "alone"), _pairs())
def test_pairs(math: Grader, one: str, other: str, verdict: str, alone: str) -> None:
    """Both ways round; and what math-verify says of them alone, so that the column stays true."""
    equal = [correct for _, correct in verdicts(math, one, other)]
    assert equal == [verdict == "equal"] * 2
    parsed = [parse(f"\\boxed{{{each}}}", parsing_timeout=None) for each in (one, other)]
    says = {verify(*order, timeout_seconds=None) for order in (parsed, parsed[::-1])}
    assert says == {"equal": {True}, "other": {False}, "one way": {True, False}}[alone]


def test_votes_are_one_where_answers_are() -> None:
    for answers, winner in (
        (["3", "2,1", "1, 2", "3", r"\{2,1\}"], 1),
        (["2125/216", "2 125/216", "557/216"], 1),
        (["2,3", "2,2,3", "2,2,3"], 1),
        (["5", "5²", "25", "25 cm"], 1),
        (["(B)", "7", "(B) 25", "7", "B"], 0),
    ):
        votes = [canonical_answer(f"\\boxed{{{answer}}}") for answer in answers]
        assert majority(votes) == winner
    assert canonical_answer(r"\boxed{10^{9999}}") == "10^{9999}"  # more digits than Python writes


def test_votes_are_counted_in_one_spelling() -> None:
    for spellings, one in (
        ((r"\frac{1}{6}", r"0.1\overline{6}", "1/6", r"\dfrac16", "$1/6$."), "1/6"),
        (("0.00001", "1e-05", r"10^{-5}", r"\approx 1\times10^{-5}"), "1/100000"),
        (("30°", r"30\degree", "30", r"30^{\circ}", "**30**"), "30"),
        (("(1, 2)", "(1,2)", r"\left(1,\,2\right)"), "(1,2)"),
        (("New York", r"\text{New York}", r"\mathbf{New~York}"), "New York"),
        (("–5", "-5", "−5", "- 5"), "-5"),
    ):
        assert {canonical_answer(f"\\boxed{{{each}}}") for each in spellings} == {one}


def test_long_answers_take_no_time() -> None:
    for unit in (
        "9",
        "1,234",
        r"\frac{1}{",
        "(",
        r"\overline{",
        "1 ",
        r"\text{",
        r"\boxed 5 ",
        "–",
    ):
        text = unit * (10**5 // len(unit))
        assert is_correct(f"\\boxed{{{text}}}", "1") is False
