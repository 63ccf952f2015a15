"""Input of any kind ends in success or in one ValueError that says where, never otherwise."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_phf.cli import preflight
from megatron_phf.config.flags import build_parser, parse_args
from megatron_phf.data.problems import read_problems
from megatron_phf.data.prompts import PromptTemplates, fill, load_template
from megatron_phf.data.rollouts import read_rollouts
from megatron_phf.data.stop_tokens import stop_token_ids
from megatron_phf.evaluation.grading import is_correct
from megatron_phf.files.foreign import check_weight_index
from megatron_phf.model.architecture import check_split, read_architecture

# Derandomised: the same cases in every run, so that a red test is never another's fault.
BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
QWEN = {
    "model_type": "qwen3", "hidden_act": "silu", "num_hidden_layers": 4, "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "vocab_size": 250, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_scaling": None, "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
PROBLEM = {"problem": "1+1", "solution": "2", "answer": "2"}
ROLLOUT = {"student_prompt_ids": [1], "teacher_prompt_ids": [1], "response_ids": [1]}

# JSON texts that json.dumps would not write.
HOSTILE = [
    "[" * 100_000, '{"a":' * 50_000, "9" * 5_000, "-" + "9" * 5_000, "1e400", "-1e400", "NaN",
    "Infinity", "-Infinity", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', "1" + "0" * 400, "0",
    "-1", "2.5", "1e3", "true", "null", '""', '"  "', "[]", "{}", "[[1]]", "[1e400]",
    "[true]", "[-1]",
    '{"rope_type": {}}', '{"rope_theta": null}', '{"rope_type": "llama3"}', '{"rope_theta": "x"}',
    '{"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, '
    '"original_max_position_embeddings": 8192, "factor": []}',
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4)
)
texts = st.sampled_from(HOSTILE) | values.map(json.dumps)


def documents(good: dict[str, object]) -> st.SearchStrategy[str]:
    """``good`` as JSON with a few fields removed, replaced by anything, or given twice."""
    change = st.dictionaries(st.sampled_from(sorted(good)), st.none() | texts, max_size=3)

    def build(changed: dict[str, str | None], twice: bool) -> str:
        fields = {name: json.dumps(value) for name, value in good.items()} | changed
        pairs = [f'"{name}": {text}' for name, text in fields.items() if text is not None]
        return "{" + ", ".join(pairs + pairs[:1] * twice) + "}"

    return st.builds(build, change, st.booleans())


raw = st.binary(max_size=200) | st.text(max_size=200).map(
    lambda t: t.encode("utf-8", "surrogatepass")
)
endings = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\x00\n", b"\x0b\n", b"\xe2\x80\xa8"])
starts = st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\n"])


def lines_of(good: dict[str, object]) -> st.SearchStrategy[bytes]:
    """A file of good, nearly good and wild lines."""
    line = documents(good).map(lambda t: t.encode()) | texts.map(lambda t: t.encode()) | raw
    body = st.lists(st.tuples(line, endings).map(b"".join), max_size=4).map(b"".join)
    return st.tuples(starts, body).map(b"".join)


def attempt(read: Callable[[str], object], name: str, data: bytes, where: str) -> object | None:
    """The result, or None after a ValueError that says ``where`` in one short line."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        path.write_bytes(data)
        try:
            return read(str(path))
        except ValueError as error:
            assert type(error) is ValueError, repr(error)
            message = str(error).replace(directory, "")
            assert re.search(where, message), message
            assert len(message) < 600 and message.isprintable(), message
            return None


@BOUNDED
@given(lines_of(PROBLEM))
@example(b'{"problem": "\\ud800", "solution": "2"}\n')
@example(b'{"problem": "1", "solution": "2", "answer": 1e400}\n')
def test_problems(data: bytes) -> None:
    problems = attempt(read_problems, "d.jsonl", data, r"d\.jsonl:\d+: |no problems in it")
    for problem in problems or ():  # what was accepted can be used
        text = fill("{problem} {solution}", problem) + (problem.answer or "")
        assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text


@BOUNDED
@given(lines_of(ROLLOUT))
def test_replay_files(data: bytes) -> None:
    def read(path: str) -> object:
        return read_rollouts(path, 250)

    rollouts = attempt(read, "r.jsonl", data, r"r\.jsonl:\d+: |no rollouts in it|is compressed")
    for rollout in rollouts or ():
        assert all(0 <= i < 250 for i in rollout.response_ids)


@settings(BOUNDED, max_examples=400)
@given(documents(QWEN).map(str.encode) | texts.map(str.encode) | raw)
def test_model_configurations(data: bytes) -> None:
    def read(path: str) -> object:
        arch = read_architecture(str(Path(path).parent))
        lengths = ["--max-prompt-length", "64", "--max-teacher-prompt-length", "128"]
        check_split(arch, parse_args(["--hf-model", "m", "--data", "d", *lengths]))
        return arch.num_parameters()

    attempt(read, "config.json", data, r"config\.json: |--max-prompt-length")


@BOUNDED
@given(
    documents({"weight_map": {"a": "b"}, "metadata": {}}).map(str.encode)
    | st.dictionaries(st.text(max_size=9), st.text(max_size=9))
    .map(lambda m: json.dumps({"weight_map": m}).encode())
    | raw
)  # fmt: skip
def test_weight_indexes(data: bytes) -> None:
    name = "model.safetensors.index.json"
    attempt(lambda path: check_weight_index(str(Path(path).parent)), name, data, name)


class NoStopToken:
    eos_id = None
    source = "--hf-model m"


@BOUNDED
@given(documents({"eos_token_id": 1}).map(str.encode) | raw)
def test_generation_configurations(data: bytes) -> None:
    def read(path: str) -> object:
        return stop_token_ids(NoStopToken(), str(Path(path).parent))

    attempt(read, "generation_config.json", data, "generation_config|no end-of-sequence token")


@BOUNDED
@given(st.tuples(starts, raw, st.sampled_from([b"", b"{problem}", b"{problem}{solution}"])))
def test_templates(parts: tuple[bytes, ...]) -> None:
    def read(path: str) -> object:
        text = load_template(path, "--teacher-template")
        assert not text.startswith("\ufeff") or parts[0] == b"\xef\xbb\xbf"
        return PromptTemplates(teacher=text)

    attempt(read, "t.txt", b"".join(parts), "--teacher-template")


PATHS = ["", "\0", "a\0b", "/nowhere", "/", "/dev/null/x", "\ud800", "\udcff", "x" * 5000]


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str) -> None:
    for read in (
        read_problems,
        lambda p: read_rollouts(p, 9),
        lambda p: load_template(p, "--student-template"),
        read_architecture,
    ):
        with pytest.raises(ValueError, match=r"--data|--replay-file|--student-template|--hf-model"):
            read(path)


FLAGS = sorted(
    s for a in build_parser()._actions for s in a.option_strings if s not in ("-h", "--help")
)
words = st.sampled_from(
    ["0", "-1", "1", "2", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 5000, "9" * 30, "", "\0",
     "\ud800", "/nowhere", "auto", "none", "true", "--", "-", "=", "0x10", "1_000", "١"]
)  # fmt: skip


@settings(BOUNDED, max_examples=400)
@given(st.lists(st.tuples(st.sampled_from([*FLAGS, "--no-such"]), words), max_size=4))
def test_command_lines(pairs: list[tuple[str, str]]) -> None:
    """preflight answers 0, or 2 with one line."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    errors = StringIO()
    with redirect_stderr(errors), redirect_stdout(StringIO()):
        status = preflight.main([word for pair in pairs for word in pair])
    lines = errors.getvalue().splitlines()
    assert (status, len(lines)) in ((0, 0), (2, 1))
    assert status == 0 or lines[0].startswith("error: ")


@BOUNDED
@given(st.text(max_size=80), st.text(max_size=20))
def test_grading(text: str, answer: str) -> None:
    for generation in (text, f"\\boxed{{{text}}}", f"\\boxed{{{text}", f"#### {text}"):
        assert is_correct(generation, answer) in (True, False)


def test_grading_takes_no_time_on_a_model_that_repeats_itself() -> None:
    """38,912 tokens of it: each start scanned to the end would take minutes."""
    assert not is_correct("\\boxed{" * 38_912, "1")
    assert is_correct("\\boxed{" * 38_912 + "7}", "7")


@pytest.mark.parametrize("length", [10_000_000])
def test_a_very_long_line(tmp_path: Path, length: int) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({**PROBLEM, "problem": "x" * length}) + "\n")
    assert len(read_problems(str(path))[0].problem) == length
    path.write_text("x" * length)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: not JSON") as caught:
        read_problems(str(path))
    assert len(str(caught.value)) < 600
