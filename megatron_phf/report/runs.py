"""The files of runs (``--output-dir``), read as input from elsewhere.

``run.json`` names a run; ``metrics.jsonl`` has a step a line, ``evaluations.jsonl`` an evaluation
(docs/evaluation.md).  Any field but names, seeds and steps may be missing or null.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import read_jsonl
from megatron_phf.files.foreign import read_json_object, shown
from megatron_phf.hidden.spec import FlowSpec, flow_spec

RUN_FILE, METRICS_FILE, EVALUATIONS_FILE = "run.json", "metrics.jsonl", "evaluations.jsonl"
_FIRST = ("base", "sft", "opsd", "phf")  # the rest are compared with them
Line = Mapping[str, Any]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_numbers(value: object) -> bool:
    """Null: one that was not finite."""
    return isinstance(value, list) and all(v is None or _is_number(v) for v in value)


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_verdicts(value: object) -> bool:
    """[problems][k] of true or false, k the same everywhere."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value)
        and all(isinstance(good, bool) for row in value for good in row)
    )


def _is_samples(value: object) -> bool:
    texts = "problem", "reference", "answer", "generation"
    return isinstance(value, list) and all(
        isinstance(sample, dict)
        and all(sample.get(name) is None or _is_text(sample[name]) for name in texts)
        and isinstance(sample.get("correct", False), bool | None)
        for sample in value
    )


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_Kind = tuple[str, Callable[[object], bool]]
_NUMBER: _Kind = ("a number", _is_number)
_NUMBERS: _Kind = ("a list of numbers or nulls", _is_numbers)
_TABLE: _Kind = ("an object of numbers", _is_table)
_OBJECT: _Kind = ("an object", _is_object)
_RUN: dict[str, _Kind] = {
    "world_size": _NUMBER, "device": ("a string", _is_text), "model": _OBJECT, "config": _OBJECT,
}  # fmt: skip
_METRICS: dict[str, _Kind] = {
    **dict.fromkeys(
        (
            "loss", "opsd", "grad_norm", "learning_rate", "clipped_fraction", "teacher_entropy",
            "student_entropy", "teacher_agreement", "copied_words", "rollout_tokens",
            "peak_memory_bytes", "nonfinite_steps",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(("seconds", "memory_bytes", "rollout_lengths", "collapse_signs"), _TABLE),
}  # fmt: skip
# How the metrics end that are lists of a hidden-state term's values.
LISTS = ("_per_layer", "_per_pair")
_EVALUATION: dict[str, _Kind] = {
    **dict.fromkeys(("k", "average_at_k", "pass_at_k", "majority_at_k", "seconds"), _NUMBER),
    "interval_95": ("two numbers", _is_interval),
    "correct": ("a list of lists of true or false, one a problem, all of one length", _is_verdicts),
    "samples": ("a list of samples", _is_samples),
}


@dataclass(frozen=True)
class Run:
    """One run; ``steps`` and ``evaluations`` in order of their step, one each.

    ``flow``: the parts of the flow loss that it trained on, None where one is the user's own.
    """

    name: str
    seed: int
    directory: str
    info: Line
    steps: Sequence[Line]
    evaluations: Sequence[Line]
    flow: FlowSpec | None

    @property
    def on_gpu(self) -> bool:
        """Whether the run's device was a GPU."""
        return self.info.get("device") == "cuda"

    @property
    def processes(self) -> int:
        """Its ranks, one GPU each where there are GPUs."""
        return int(self.info.get("world_size") or 1)


@dataclass(frozen=True)
class Variant:
    """The runs of one name, by seed."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds, in order."""
        return [run.seed for run in self.runs]


def _check(content: Line, kinds: Mapping[str, _Kind], where: str) -> None:
    for name, (needed, good) in kinds.items():
        value = content.get(name)
        if value is not None and not good(value):
            raise ValueError(
                f"{where}: field {name!r} is {shown(value)}, not {needed}; remove or mend it"
            )


def _is_flow(name: str) -> bool:
    return name.split("_")[0] == "flow"


def _flow_kind(name: str) -> _Kind:
    """Of ``flow``, ``flow_<term>`` or a term's list."""
    return _NUMBERS if name.endswith(LISTS) else _NUMBER


def _integer(content: Line, name: str, where: str) -> int:
    value = content.get(name)
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{where}: field {name!r} is {shown(value)}, not a whole number from 0")
    return value


def _read_lines(path: str, kinds: Mapping[str, _Kind]) -> list[Line]:
    """By step; of a step that a resumed run wrote twice the later line."""
    if not os.path.exists(path):
        return []
    lines: dict[int, Line] = {}
    for number, content in read_jsonl(path, "RUN"):
        where = f"{path}:{number}"
        _check(content, kinds, where)
        _check(content, {name: _flow_kind(name) for name in content if _is_flow(name)}, where)
        lines[_integer(content, "step", where)] = content
    return [lines[step] for step in sorted(lines)]


def _flow_spec(info: Line, path: str) -> FlowSpec | None:
    """The parts of the flow loss that the run trained on; all where its file does not say.

    None where a term is the user's own: a report runs no code that a file names.
    """
    names = ("phf_terms", "phf_layers")
    try:
        method = (info.get("config") or {}).get("method") or {}
        if ":" in str(method.get("phf_terms")):
            return None
        return flow_spec(Config().replaced(**{n: method[n] for n in names if n in method}))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: settings of the flow loss: {error}") from error


def _metrics_path(directory: str, info: Line) -> str:
    """Of ``--metrics-file``, where there is none beside ``run.json``."""
    path, output = os.path.join(directory, METRICS_FILE), (info.get("config") or {}).get("output")
    named = output.get("metrics_file") if isinstance(output, dict) else None
    if isinstance(named, str) and not os.path.exists(path) and os.path.isfile(named):
        return named
    return path


def read_run(directory: str) -> Run:
    """The run in ``directory``.

    Raises:
        ValueError: a file is damaged or a field has another type; names file and line.
    """
    path = os.path.join(directory, RUN_FILE)
    info = read_json_object(path)
    _check(info, _RUN, path)
    name = info.get("run_name")
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(f"{path}: field 'run_name' is {shown(name)}, not a name")
    return Run(
        name,
        _integer(info, "seed", path),
        directory,
        info,
        _read_lines(_metrics_path(directory, info), _METRICS),
        _read_lines(os.path.join(directory, EVALUATIONS_FILE), _EVALUATION),
        _flow_spec(info, path),
    )


def _find(path: str) -> list[str]:
    """``path`` if it is a run, else the runs below it."""
    if os.path.isfile(os.path.join(path, RUN_FILE)):
        return [path]
    found = sorted(folder for folder, _, files in os.walk(path) if RUN_FILE in files)
    if not found:
        raise ValueError(
            f"RUN {path}: no {RUN_FILE} in or below it; give the --output-dir of a training run"
        )
    return found


def _order(name: str) -> tuple[int, list[tuple[float, str]]]:
    """The usual variants first; then by name, numbers in it by value."""
    words = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    numbers = [(float(word), "") if word[0].isdecimal() else (-1.0, word) for word in words]
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST)), numbers


def read_variants(paths: Iterable[str]) -> list[Variant]:
    """All runs in and below ``paths``, grouped by name, the usual names first.

    Raises:
        ValueError: no run, a damaged one, two of one name and seed, or evaluations of which one has
            other problems or samples than another.
    """
    directories = dict.fromkeys(os.path.normpath(d) for path in paths for d in _find(path))
    groups: dict[str, dict[int, Run]] = {}
    for directory in directories:
        run = read_run(directory)
        seeds = groups.setdefault(run.name, {})
        if run.seed in seeds:
            raise ValueError(
                f"{directory} and {seeds[run.seed].directory}: both are {run.name!r} with seed "
                f"{run.seed}; leave one out, or give it another --run-name"
            )
        seeds[run.seed] = run
    variants = [
        Variant(name, [groups[name][seed] for seed in sorted(groups[name])])
        for name in sorted(groups, key=_order)
    ]
    _check_comparable(variants)
    return variants


def _check_comparable(variants: Sequence[Variant]) -> None:
    shapes: dict[tuple[int, int], str] = {}
    for run in (run for variant in variants for run in variant.runs):
        for evaluation in run.evaluations:
            correct = evaluation.get("correct")
            if correct is not None:
                shapes.setdefault((len(correct), len(correct[0])), run.directory)
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise ValueError(
            f"{first} was evaluated on {one[0]} problems x {one[1]} samples, {second} on "
            f"{other[0]} x {other[1]}: no comparison; report them one by one"
        )
