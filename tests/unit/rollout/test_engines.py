"""An engine that is none, and answers that are none: one error that names flag and remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from examples.engines.calculator import Calculator, calculate
from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.rollout.checked import CheckedEngine
from megatron_phf.rollout.engines import ENGINES, check_engine, load_factory, make_by_factory
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from tests.own_engines import Scripted

SAMPLING = SamplingParams(1.0, 1.0, 0, 3, (1,), seed=3)
REAL = ["--hf-model", "x", "--data", "y", "--rollout-engine"]


def test_every_engine_of_the_table_is_there() -> None:
    for name in ENGINES:
        assert callable(load_factory(name))
        check_engine(parse_args(["--rollout-engine", name]))
    check_engine(parse_args([*REAL, "examples.engines.calculator:make_engine"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*REAL, "sglang"], "sglang: need megatron, vllm, reference, replay or package.module:fac"),
        ([*REAL, "a.b:"], "need megatron"),
        ([*REAL, ":f"], "need megatron"),
        ([*REAL, "a b:f"], "need megatron"),
        ([*REAL, "nowhere:f"], r"nowhere:f: nowhere cannot be imported \(there is no such.*PYTHON"),
        ([*REAL, "tests.nowhere:f"], "tests.nowhere cannot be imported"),
        ([*REAL, "json.tool.nowhere:f"], "json.tool.nowhere cannot be imported"),
        (["--rollout-engine", "tests.own_engines:f"], "needs --hf-model and --data"),
    ],
)
def test_what_is_refused_before_launch(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        preflight.check(parse_args(flags))
    assert str(caught.value).startswith("--rollout-engine ")


def test_before_launch_nothing_of_it_runs() -> None:
    """Neither torch nor the user's package is imported: a rank does not know its device yet."""
    code = (
        "import sys; from megatron_phf.config.flags import parse_args;"
        "from megatron_phf.cli import preflight;"
        f"preflight.check_engine(parse_args({[*REAL, 'tests.own_engines:no_engine']!r}));"
        f"preflight.check_engine(parse_args({[*REAL, 'examples.engines.calculator:f']!r}));"
        "assert not {'torch', 'tests', 'tests.own_engines'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "tests.own_engines has no function missing; need a function of one argument"),
        ("NOT_A_FUNCTION", "has no function NOT_A_FUNCTION"),
        ("without_context", "too many positional arguments; need a function of one argument"),
        ("no_engine", r"gave a str without prepare and generate; an engine has prepare\(step\)"),
    ],
)
def test_a_factory_that_gives_no_engine(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_by_factory(f"tests.own_engines:{name}", None)
    assert str(caught.value).startswith(f"--rollout-engine tests.own_engines:{name}: ")


def test_a_module_that_fails_at_import(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_engine.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)  # modules of the working directory are found
    check_engine(parse_args([*REAL, "broken_engine:f"]))
    with pytest.raises(ValueError, match=r"imported \(ZeroDivisionError: division by zero\)"):
        load_factory("broken_engine:f")


def checked(answer, monkeypatch: pytest.MonkeyPatch, others: tuple = ()) -> list[Response]:
    """``answer`` to one prompt with room for 3 tokens; ``others``: what other ranks say."""
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel, "gather_objects", lambda mine: [mine, *others])
    engine = CheckedEngine(Scripted(lambda count: answer), "own:f", 32)
    return engine.generate([[5]], SAMPLING, [0], [9])


@pytest.mark.parametrize(
    "answer",
    [
        Response([]),
        Response((4, 31), (0.0, -1.5), (True, False), 7),
        Response([4, 5, 6], [-1, -2, -3]),
    ],
)
def test_good_answers_pass_as_they_are(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked([answer], monkeypatch) == [answer]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "generate gave a NoneType, need a list of Response"),
        ([], "generate gave 0 responses to 1 prompts; need one each"),
        ([[4, 5]], "response 0 is a list, need a Response"),
        ([Response("45")], "token_ids are not a list of numbers but str: '45'"),
        ([Response([4.0])], "token_ids are not a list of numbers"),
        ([Response([True])], "token_ids are not a list of numbers"),
        ([Response([4, 32])], "token ids from 4 to 32, but the vocabulary ends at 32; does it"),
        ([Response([-1])], "token ids from -1 to -1"),
        ([Response([4] * 4)], "4 tokens, but limits left room for 3; cut it there"),
        ([Response([4, 5], mask=[True])], "mask is not 2 booleans, one a token, but list of 1"),
        ([Response([4], mask=[1])], "mask is not 1 booleans"),
        ([Response([4], log_probs=[])], "log_probs are not 1 finite numbers, one a token"),
        ([Response([4], log_probs=[float("nan")])], "log_probs are not 1 finite numbers"),
        ([Response([4], policy_version="a")], "policy_version is str: 'a'"),
    ],
)
def test_wrong_answers(answer, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checked(answer, monkeypatch)
    assert str(caught.value).startswith("--rollout-engine own:f: ")


def test_answers_that_differ_between_ranks_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    good, said = [Response([4], mask=[True])], []
    checked(good, monkeypatch)
    monkeypatch.setattr(parallel, "gather_objects", lambda mine: said.append(mine) or [mine])
    CheckedEngine(Scripted(lambda count: good), "own:f", 32).generate([[5]], SAMPLING, [0])
    (_, _, digest), *_ = said
    assert checked(good, monkeypatch, ((0, None, digest), (1, None, b"another share"))) == good
    for other in (Response([5], mask=[True]), Response([4], mask=[False])):
        with pytest.raises(ValueError, match=r"ranks of one copy of the model got .*asked_once"):
            checked([other], monkeypatch, ((0, None, digest),))
    with pytest.raises(ValueError, match="a fault elsewhere"):
        checked(good, monkeypatch, ((1, "a fault elsewhere", None),))


class Words:
    """One token a word; what the calculator's student and tokenizer say."""

    words = ("stop", "2*3=", "1+", "6", "so", "x=", "-4")
    largest_id = 6

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return "".join(self.words[i] for i in ids)

    def encode(self, text: str) -> list[int]:
        return [self.words.index(text)]


def test_calls_and_what_is_none() -> None:
    assert [calculate(t) for t in ("2+3=", "so 12 * 12 =", "7-9=")] == ["5", "144", "-2"]
    assert all(calculate(text) is None for text in ("x=", "2+3", "2/3=", "=", "2+3=5", ""))


@pytest.mark.parametrize(
    ("turns", "room", "ids", "mask"),
    [
        ([[4, 1], [0]], 9, [4, 1, 3, 0], [True, True, False, True]),  # so 2*3= 6 stop
        ([[5], [0]], 9, [5, 0], [True, True]),  # x= is no call
        ([[1]], 1, [1], [True]),  # no room for the answer
        ([[1]], 2, [1, 3], [True, False]),  # for nothing behind it
        ([[4, 0]], 9, [4, 0], [True, True]),
    ],
)
def test_the_calculators_dialogue(turns, room: int, ids: list, mask: list) -> None:
    asked = []

    class Student(Scripted):
        def generate(self, prompts, sampling, sample_ids, limits=None):
            if not prompts:
                return []
            asked.append((prompts[0], sampling.stop_ids, sampling.seed, limits[0]))
            return [Response(turns[len(asked) - 1], policy_version=8)]

    engine = Calculator(Student(None), Words(), 99)
    sampling = SamplingParams(1.0, 1.0, 0, 20, (0,), seed=3)
    assert engine.generate([[9]], sampling, [5], [room]) == [Response(ids, None, mask, 8)]
    assert len(asked) == len(turns)
    assert asked[0] == ([9], (0, 1, 5), 3, room)
    if len(turns) == 2:
        prompt, stops, seed, left = asked[1]
        assert (prompt, stops, left) == ([9, *ids[:-1]], (0, 1, 5), room - len(ids) + 1)
        assert seed != 3  # not the first turn's random numbers again
