"""Problems with verified reference solutions, from JSON Lines.  Plain Python, no torch."""

from __future__ import annotations

import codecs
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_phf.config.settings import DataConfig
from megatron_phf.config.teachers import named_teacher
from megatron_phf.files.foreign import RefusedJson, parse_json, shown
from megatron_phf.files.replace import free_number, new_file

# How files begin that hold problems in another form.
_FORMS = {
    "compressed with gzip": b"\x1f\x8b",
    "compressed with zstd": b"\x28\xb5\x2f\xfd",
    "compressed with xz": b"\xfd7zXZ",
    "compressed with bzip2": b"BZh",
    "a zip archive": b"PK\x03\x04",
    "a Parquet file": b"PAR1",
    "an Arrow file": b"ARROW1",
}


@dataclass(frozen=True)
class Problem:
    """One problem; ``index`` counts the problems of its file from 0.

    ``teacher``: which one reads it, where several have names.
    """

    problem: str
    solution: str
    answer: str | None
    index: int
    teacher: str | None = None


@dataclass(frozen=True)
class FieldNames:
    """How the file calls the three fields."""

    problem: str = "problem"
    solution: str = "solution"
    answer: str = "answer"


def field_names(data: DataConfig) -> FieldNames:
    """As the flags have them."""
    return FieldNames(data.problem_field, data.solution_field, data.answer_field)


def read_jsonl(path: str, flag: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank.

    Raises:
        ValueError: the file cannot be read (names ``flag``), or a line is no JSON object (names
            ``path:line``).
    """
    for number, line in _lines(path, flag):
        yield number, _parse(line, number, path)


def _lines(path: str, flag: str) -> Iterator[tuple[int, bytes]]:
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: no possible path
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag} {path}: cannot be read ({reason})") from error
    with file:
        number = 0
        while line := _next_line(file, f"{flag} {path}"):
            number += 1
            if number == 1:
                _check_form(line, f"{flag} {path}")
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _check_form(line: bytes, name: str) -> None:
    """Raise ValueError where a file begins as no text does."""
    for form, start in _FORMS.items():
        if line.startswith(start):
            raise ValueError(
                f"{name}: is {form}; what is read is JSON Lines: UTF-8 text, not compressed, one "
                "JSON object a line; write it as that"
            )


def _next_line(file: BinaryIO, name: str) -> bytes:
    try:
        return file.readline()
    except OSError as error:  # a directory, a disk that fails
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from error


def _parse(line: bytes, number: int, path: str) -> dict[str, Any]:
    try:
        content = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8; convert the file") from error
    except RefusedJson as error:
        raise ValueError(f"{path}:{number}: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{path}:{number}: not JSON ({error}); each line must be one JSON object"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}:{number}: not a JSON object but {type(content).__name__}")
    return content


def _check_unicode(text: str, name: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {name!r} has half of a surrogate pair, which is no character; "
            "write the file again as UTF-8"
        ) from error
    return text


def _text(content: dict[str, Any], role: str, name: str, where: str) -> str:
    if name not in content:
        present = shown(list(content)).strip("[]") or "none"
        raise ValueError(
            f"{where}: no field {name!r} (fields here: {present}); name it with --{role}-field"
        )
    value = content[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} is not a string but {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: field {name!r} is empty; fill it or remove the line")
    return _check_unicode(value, name, where)


def _answer(content: dict[str, Any], line: bytes, name: str, where: str) -> str | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, str):
        return _check_unicode(value, name, where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value in (math.inf, -math.inf):
            raise ValueError(f"{where}: field {name!r} is too large a number; write it as a string")
        return _as_written(line, name)
    raise ValueError(
        f"{where}: field {name!r} is neither string nor number but {type(value).__name__}"
    )


def _as_written(line: bytes, name: str) -> str:
    """A number as it stands in the line: 0.00001, which Python would print as 1e-05."""
    content = json.loads(line.decode("utf-8-sig"), parse_float=str, parse_int=str)
    return str(content[name])


def read_problems(
    path: str,
    fields: FieldNames | None = None,
    flag: str = "--data",
    needs_solution: bool = True,
    needs_answer: bool = False,
    teachers: Sequence[str] = (),
) -> list[Problem]:
    """All problems of a JSONL file (UTF-8, blank lines skipped); the answer is optional.

    ``needs_solution`` False: a line without one gets an empty text.  ``needs_answer``: a line
    without one, or with an empty one, is a mistake.  ``teachers``: the names that the field
    ``teacher`` may have; without names it is not read.

    Raises:
        ValueError: names the file and line of the first mistake, and the remedy.
    """
    names = fields or FieldNames()
    problems: list[Problem] = []
    for number, line in _lines(path, flag):
        content, where, name = _parse(line, number, path), f"{path}:{number}", names.solution
        given = needs_solution or name in content
        answer = _answer(content, line, names.answer, where)
        if needs_answer and not (answer or "").strip(" \t\r\n$"):
            state = "no" if answer is None else "an empty"
            raise ValueError(
                f"{where}: problem {len(problems) + 1} has {state} {names.answer!r}; see "
                "--answer-field"
            )
        problems.append(
            Problem(
                problem=_text(content, "problem", names.problem, where),
                solution=_text(content, "solution", name, where) if given else "",
                answer=answer,
                index=len(problems),
                teacher=named_teacher(content.get("teacher"), teachers, where),
            )
        )
    if not problems:
        raise ValueError(f"{flag} {path}: no problems in it")
    return problems


def read_test_problems(path: str, fields: FieldNames, flag: str) -> list[Problem]:
    """Problems to evaluate on: each has an answer, none needs a solution; ValueError as above."""
    return read_problems(path, fields, flag, needs_solution=False, needs_answer=True)


def jsonl(objects: Iterable[dict[str, Any]]) -> str:
    """The text of a JSON Lines file: one object a line."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)


def write_jsonl(path: str, objects: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line: the whole file appears, or the old one stays."""
    with new_file(path) as f:
        f.write(jsonl(objects))


def keep_lines(
    path: str, wanted: Callable[[int, str], bool], ours: Callable[[str], bool] = lambda line: True
) -> None:
    """Keep the lines of a file with ``wanted(number from 1, line)``; a torn last line goes too.

    Where a line that is not ``ours`` would go, the file stays as PATH.N, and a copy is cut.  The
    file is empty afterwards where there was none.
    """
    lines: list[str] = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.endswith("\n")]
    kept = [line for i, line in enumerate(lines, start=1) if wanted(i, line)]
    if len(kept) < len(lines) and not all(ours(line) for line in lines):
        shutil.copyfile(path, f"{path}.{free_number([path])}")
    with new_file(path) as f:
        f.writelines(kept)
