"""What a chat template is given, what of it is refused, and what the job says of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from megatron_phf.data import prompts
from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptTemplates, build_prompt_pairs, problem_prompts
from megatron_phf.data.stop_tokens import prompts_digest, template_notes
from megatron_phf.data.tokenizer import HFTokenizer
from megatron_phf.demo.task import make_tokenizer

START = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
DATED = "{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}|" + START


def tokenizer(template: str, moment: datetime | None = None) -> HFTokenizer:
    library = make_tokenizer()
    library.chat_template = template
    return HFTokenizer(library, moment=moment)


def test_a_template_reads_the_moment_that_it_is_given() -> None:
    hf = tokenizer(DATED, datetime(2024, 7, 26))
    assert hf.says_the_date and hf.decode(hf.prompt("1+1", False)) == "26|1+1"
    other = tokenizer(DATED, datetime(2024, 7, 27))
    assert prompts_digest(hf) == prompts_digest(tokenizer(DATED, datetime(2024, 7, 26)))
    assert prompts_digest(hf) != prompts_digest(other)
    assert not tokenizer(START).says_the_date
    inside = "{% macro today() %}{{ strftime_now('%-d+%m') }}{% endmacro %}{{ today() }}" + START
    hf = tokenizer("\n" + inside, datetime(2024, 7, 6))
    assert hf.decode(hf.prompt("1", False)) == "6+071"


def test_a_template_without_a_moment_keeps_that_of_its_making() -> None:
    hf = tokenizer("{{ strftime_now('%f') }}" + START)
    assert len({tuple(hf.prompt("1", False)) for _ in range(50)}) == 1


@pytest.mark.parametrize(
    "template", ["{{ [1, 2]|random }}" + START, "{{ [1] | random }}", "{{ lipsum(n=1) }}" + START]
)
def test_a_template_that_draws_random_numbers(template: str) -> None:
    with pytest.raises(ValueError, match=r"--hf-model: its chat template draws random numbers"):
        tokenizer(template)
    assert tokenizer("a random lipsum | random: " + START).has_chat_template  # text says so


def test_what_is_said_of_a_template() -> None:
    thinks = "{% if enable_thinking %}<|user|>{% endif %}" + START
    ends = "{% for m in messages %}{{ m['content'] }}<|user|>{% endfor %}"
    end = make_tokenizer().eos_token_id
    assert template_notes(tokenizer(thinks), [end]) == []
    ignores, *more = template_notes(tokenizer(START + "<|end|>"), [end])
    assert "ignores enable_thinking: --student-thinking" in ignores and not more
    turn, ignores = template_notes(tokenizer(ends), [end])
    assert "ends a turn with '<|user|>', which ends no rollout ('<|end|>' does)" in turn
    assert len(template_notes(tokenizer(ends), [end, tokenizer(ends).turn_end()[0]])) == 1
    users = "{% if messages[1] is defined %}{{ raise_exception('no') }}{% endif %}"
    assert len(template_notes(tokenizer(users + START), [end])) == 1
    assert template_notes(tokenizer(""), [end]) == [
        "prompts  the tokenizer has no chat template: plain text and a newline"
    ]


def test_prompts_in_batches_are_those_of_one_after_another(monkeypatch) -> None:
    monkeypatch.setattr(prompts, "_BATCH", 3)
    texts = ["1+1", "2<|end|>+2", "3-3", "4", "<|user|>5", "6", "7+7"]
    problems = [Problem(text, "0", None, i) for i, text in enumerate(texts)]
    hf = HFTokenizer(make_tokenizer())
    expected = [hf.prompt(hf.protect(text), False) for text in texts]
    assert problem_prompts(hf, "{problem}", False, problems) == expected

    def halves(make, everything):
        first, second = make(everything[::2]), make(everything[1::2])
        return [(first if i % 2 == 0 else second)[i // 2] for i in range(len(everything))]

    templates = PromptTemplates("{problem}", "{problem}{solution}")
    pairs = [
        build_prompt_pairs(hf, problems, templates, 99, 99, **more)
        for more in ({}, {"spread": halves})
    ]
    assert pairs[0] == pairs[1] and len(pairs[0][0]) == 7


def test_the_problem_that_a_template_fails_on_is_named() -> None:
    fails = "{% if '3' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + START
    problems = [Problem(str(i), "0", None, i) for i in range(6)]
    with pytest.raises(ValueError, match=r"problem 3: --hf-model: its chat template fails"):
        problem_prompts(tokenizer(fails), "{problem}", False, problems)


def test_a_file_in_another_form_is_told_from_damage(tmp_path: Path) -> None:
    from megatron_phf.data.problems import read_problems

    for name, start, form in (
        ("d.jsonl.gz", b"\x1f\x8b\x08\0\n", "compressed with gzip"),
        ("d.parquet", b"PAR1\x15\x04\n", "a Parquet file"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd\n", "compressed with zstd"),
    ):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=rf"--data .*{name}: is {form}; what is read is"):
            read_problems(str(tmp_path / name))
