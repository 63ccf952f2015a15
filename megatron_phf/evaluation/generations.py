"""What ``tools/evaluate.py`` keeps of a test set: every generation, resumable problem by problem.

A directory holds ``settings.json`` (what was asked of which model), ``generations.jsonl`` (a
problem a line, with all its graded answers) and, at the end, ``summary.json``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from megatron_phf.data.problems import Problem, keep_lines, read_jsonl
from megatron_phf.evaluation.evaluate import Answer, Evaluation
from megatron_phf.files.replace import write_json

_GENERATIONS, _SUMMARY = "generations.jsonl", "summary.json"


def read_generations(path: str, flag: str) -> list[tuple[str, list[Answer]]]:
    """(problem's text, its answers) of each line; ValueError names file and line of a mistake."""
    found = []
    for number, content in read_jsonl(path, flag):
        try:
            answers = [Answer(**answer) for answer in content["answers"]]
            found.append((str(content["problem"]), answers))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not a line of tools/evaluate.py's generations ({error})"
            ) from error
    return found


class GenerationStore:
    """One test set's directory; for one process."""

    def __init__(self, directory: str, settings: dict[str, Any]) -> None:
        """Continue what an evaluation with the same ``settings`` left there, or begin.

        Raises:
            ValueError: the directory belongs to another evaluation, or cannot be written.
        """
        self._directory = directory
        self._path = os.path.join(directory, _GENERATIONS)
        try:
            os.makedirs(directory, exist_ok=True)
            self._check_settings(settings)
            keep_lines(self._path, lambda number, line: True)
        except OSError as error:
            raise ValueError(f"--output-dir {directory}: cannot be written ({error})") from error

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = os.path.join(self._directory, "settings.json")
        settings = json.loads(json.dumps(settings))
        if not os.path.exists(path):
            for name in (_GENERATIONS, _SUMMARY):
                if os.path.lexists(os.path.join(self._directory, name)):
                    raise ValueError(
                        f"--output-dir {self._directory}: its {name} is of no evaluation (there "
                        "is no settings.json); name another directory"
                    )
            write_json(path, settings)
            return
        with open(path, encoding="utf-8") as f:
            before = json.load(f)
        other = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
        if other:
            raise ValueError(
                f"--output-dir {self._directory}: holds an evaluation with other settings "
                f"({', '.join(other)}); name another directory"
            )

    def done(self, problems: Sequence[Problem]) -> list[Evaluation]:
        """What is there already, for the first of ``problems``.

        Raises:
            ValueError: a damaged line, or one of another problem.
        """
        parts = []
        stored = read_generations(self._path, "--output-dir")[: len(problems)]
        for problem, (text, answers) in zip(problems, stored, strict=False):
            if text != problem.problem:
                raise ValueError(
                    f"{self._path}: line {problem.index + 1} is not problem {problem.index + 1} "
                    "of the data; name another --output-dir"
                )
            parts.append(Evaluation([problem], [answers], 0.0))
        return parts

    def add(self, part: Evaluation) -> None:
        """Append the problems of ``part``; on the disk when this returns."""
        with open(self._path, "a", encoding="utf-8") as f:
            for problem, row in zip(part.problems, part.answers, strict=True):
                line = {
                    "problem": problem.problem,
                    "answer": problem.answer,
                    "answers": [dataclasses.asdict(a) for a in row],
                }
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def finish(self, whole: Evaluation) -> None:
        """Write the summary."""
        record = whole.record(shown=0)
        del record["samples"]
        write_json(os.path.join(self._directory, _SUMMARY), record)
