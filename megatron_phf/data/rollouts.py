"""Recorded rollouts: exact reproduction, debugging, and comparison with other programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.teachers import named_teacher
from megatron_phf.data.problems import read_jsonl

_FIELDS = ("student_prompt_ids", "teacher_prompt_ids", "response_ids")
_MASK, _LOGS, _KEPT, _TEACHER = "response_mask", "log_probs", "kept", "teacher"
_UNRECORDED = ("policy_version", "policy_version_end", "reference", _TEACHER)


@dataclass(frozen=True)
class Rollout:
    """Token ids: two prompts for the same problem, and the student's response to the first.

    ``log_probs``: of the response's tokens, nats, where another program sampled it.
    ``response_mask``: False for a token that the student did not write (a tool's output): it is
    read by both models and not scored; None: all are.  ``policy_version``: the step whose weights
    sampled it, where known, and ``policy_version_end`` that of its last token, where newer weights
    came amid it.  ``kept`` False: sampled, and not trained on (``--keep-rollouts``).
    ``reference``: the problem's solution, where known; not recorded.  ``teacher``: which one reads
    it, where several have names.
    """

    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None
    response_mask: tuple[bool, ...] | None = None
    policy_version: int | None = None
    policy_version_end: int | None = None
    kept: bool = True
    reference: str | None = None
    teacher: str | None = None

    def trained(self) -> Rollout:
        """What a step reads of it: of one that is not kept, the prompts alone."""
        if self.kept:
            return self
        logs = None if self.log_probs is None else ()
        return dataclasses.replace(self, response_ids=(), log_probs=logs, response_mask=None)

    @property
    def scored(self) -> tuple[bool, ...]:
        """Which of the response's tokens the student wrote: those that the losses see."""
        if self.response_mask is None:
            return (True,) * len(self.response_ids)
        return self.response_mask

    def skipping(self, count: int) -> Rollout:
        """The same, the first ``count`` tokens of the response read and not scored."""
        if count == 0:
            return self
        scored = tuple(s and i >= count for i, s in enumerate(self.scored))
        return dataclasses.replace(self, response_mask=scored)


def written_stop(ids: Sequence[int], mask: Sequence[bool] | None, stop_ids: Sequence[int]) -> bool:
    """Whether a response ends with a stop token that the student wrote itself."""
    return bool(ids) and ids[-1] in stop_ids and (mask is None or mask[-1])


def _ids(content: dict[str, Any], name: str, vocab_size: int | None, where: str) -> tuple[int, ...]:
    if name not in content:
        raise ValueError(f"{where}: no field {name!r}; needed are {', '.join(_FIELDS)}")
    ids = content[name]
    good = isinstance(ids, list) and all(isinstance(i, int) and type(i) is not bool for i in ids)
    if not good:
        raise ValueError(f"{where}: {name!r} is not a list of token ids")
    if not ids and name != "response_ids":  # an empty response has nothing to learn from
        raise ValueError(f"{where}: {name!r} is empty; remove the line")
    limit = float("inf") if vocab_size is None else vocab_size
    if ids and (min(ids) < 0 or max(ids) >= limit):
        raise ValueError(
            f"{where}: {name!r} has token ids from {min(ids)} to {max(ids)}, but the model's "
            f"vocabulary is 0 to {vocab_size} - 1; was it recorded with another model?"
        )
    return tuple(ids)


def _mask(content: dict[str, Any], count: int, where: str) -> tuple[bool, ...] | None:
    mask = content.get(_MASK)
    if mask is None:
        return None
    if not isinstance(mask, list) or len(mask) != count or not all(m in (0, 1) for m in mask):
        raise ValueError(
            f"{where}: {_MASK!r} is not a list of {count} zeros and ones, one for each of "
            "'response_ids' (0: a token that the student did not write)"
        )
    return tuple(map(bool, mask))


def _log_probs(content: dict[str, Any], count: int, where: str) -> tuple[float, ...] | None:
    logs = content.get(_LOGS)
    if logs is None:
        return None
    good = isinstance(logs, list) and len(logs) == count
    if not good or not all(isinstance(x, int | float) and math.isfinite(x) for x in logs):
        raise ValueError(
            f"{where}: {_LOGS!r} is not a list of {count} finite numbers, one for each of "
            "'response_ids'"
        )
    return tuple(map(float, logs))


def _rollout(
    content: dict[str, Any], vocab_size: int | None, where: str, teachers: Sequence[str] = ()
) -> Rollout:
    student, teacher, response = (_ids(content, name, vocab_size, where) for name in _FIELDS)
    mask = _mask(content, len(response), where)
    logs = _log_probs(content, len(response), where)
    kept = content.get(_KEPT, True)
    if not isinstance(kept, bool):
        raise ValueError(f"{where}: {_KEPT!r} is neither true nor false")
    name = named_teacher(content.get(_TEACHER), teachers, where)
    return Rollout(student, teacher, response, logs, mask, kept=kept, teacher=name)


def read_rollouts(path: str, vocab_size: int | None, teachers: Sequence[str] = ()) -> list[Rollout]:
    """All rollouts of a replay file, in file order.

    The three lists of ids, and ``response_mask``, ``log_probs`` and ``kept`` where there are such,
    and, where ``teachers`` have names, ``teacher``; other fields are ignored.

    Raises:
        ValueError: names the file and line of the first mistake.
    """
    stamp = None
    with contextlib.suppress(OSError, ValueError):  # read_jsonl says what is wrong
        found = os.stat(path)
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
    return [*_parsed(path, vocab_size, tuple(teachers), stamp)]


@functools.lru_cache(maxsize=1)
def _parsed(
    path: str, vocab_size: int | None, teachers: tuple[str, ...], stamp: object
) -> tuple[Rollout, ...]:
    """Once for the check before launch and the run; ``stamp``: which state of the file."""
    rollouts = tuple(
        _rollout(content, vocab_size, f"{path}:{number}", teachers)
        for number, content in read_jsonl(path, "--replay-file")
    )
    if not rollouts:
        raise ValueError(f"--replay-file {path}: no rollouts in it")
    return rollouts


def rollout_to_json(rollout: Rollout, log_probs: bool = False) -> dict[str, Any]:
    """The line of a replay file; ``log_probs``: with those, where they are known."""
    line: dict[str, Any] = {name: list(getattr(rollout, name)) for name in _FIELDS}
    if rollout.response_mask is not None:
        line[_MASK] = [int(scored) for scored in rollout.response_mask]
    if not rollout.kept:
        line[_KEPT] = False
    if rollout.teacher is not None:
        line[_TEACHER] = rollout.teacher
    if log_probs and rollout.log_probs is not None:
        line[_LOGS] = list(rollout.log_probs)
    return line


def write_sampled(path: str, steps: Mapping[int, Sequence[Rollout]]) -> None:
    """Write rollouts that wait for their steps, with all that is known of them."""
    with open(path, "w", encoding="utf-8") as f:
        for step, rollouts in steps.items():
            for rollout in rollouts:
                more = {name: getattr(rollout, name) for name in _UNRECORDED}
                line = {"step": step, **rollout_to_json(rollout, log_probs=True), **more}
                f.write(json.dumps(line) + "\n")


def read_sampled(path: str) -> dict[int, list[Rollout]]:
    """What :func:`write_sampled` wrote."""
    steps: dict[int, list[Rollout]] = {}
    for number, content in read_jsonl(path, "--load"):
        more: dict[str, Any] = {name: content.get(name) for name in _UNRECORDED}
        rollout = _rollout(content, None, f"{path}:{number}")
        steps.setdefault(content["step"], []).append(dataclasses.replace(rollout, **more))
    return steps


def is_rollout(line: str) -> bool:
    """Whether a line is one of a replay file."""
    try:
        return set(_FIELDS) <= set(json.loads(line))
    except (ValueError, TypeError):
        return False
