"""Rewrite a public data set as the JSONL that ``--data`` reads.

    python tools/prepare_data.py gsm8k data/gsm8k_train.jsonl runs/gsm8k.jsonl --limit 1000

GSM8K: ``question`` becomes ``problem``; ``answer`` splits at ``####`` into ``solution`` and
``answer``; calculator marks (``<<48/2=24>>``) go; the solution ends with ``\\boxed{answer}``, the
form that both prompts ask for.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from megatron_phf.console import program
from megatron_phf.data.problems import jsonl, read_jsonl
from megatron_phf.files.replace import write_new_text

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def convert_gsm8k(content: dict[str, Any], where: str) -> dict[str, str]:
    """One line of GSM8K -> ``problem``, ``solution``, ``answer``.

    Raises:
        ValueError: names ``where`` (file and line) and what is missing.
    """
    question, text = content.get("question"), content.get("answer")
    if not isinstance(question, str) or not isinstance(text, str):
        raise ValueError(f"{where}: GSM8K lines have the strings 'question' and 'answer'")
    solution, mark, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError(f"{where}: no final answer after '####'")
    solution = _CALCULATOR_MARK.sub("", solution).strip()
    return {
        "problem": question.strip(),
        "solution": f"{solution}\nThe answer is \\boxed{{{answer}}}.",
        "answer": answer,
    }


CONVERTERS: dict[str, Callable[[dict[str, Any], str], dict[str, str]]] = {"gsm8k": convert_gsm8k}


def convert(name: str, path: str) -> Iterator[dict[str, str]]:
    """The converted lines of ``path``.

    Raises:
        ValueError: names the file and line of the first mistake.
    """
    for number, content in read_jsonl(path, "INPUT"):
        yield CONVERTERS[name](content, f"{path}:{number}")


@program
def main(argv: list[str] | None = None) -> int:
    """Convert; 2 and one error line at the first mistake, with nothing written."""
    parser = argparse.ArgumentParser(description="Rewrite a data set as the JSONL of --data.")
    parser.add_argument("format", choices=sorted(CONVERTERS))
    parser.add_argument("input", help="the data set's file, JSONL")
    parser.add_argument("output", help="the JSONL to write")
    parser.add_argument("--limit", type=int, default=None, help="only the first LIMIT problems")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: need at least 1")
    problems = list(islice(convert(args.format, args.input), args.limit))
    os.makedirs(os.path.dirname(os.path.realpath(args.output)), exist_ok=True)
    write_new_text(args.output, jsonl(problems))
    print(f"{len(problems)} problems written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
