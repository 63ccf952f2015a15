"""Recorded rollouts: exact reproduction, debugging, and comparison with other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_phf.data.problems import read_jsonl

_FIELDS = ("student_prompt_ids", "teacher_prompt_ids", "response_ids")


@dataclass(frozen=True)
class Rollout:
    """Token ids: two prompts for the same problem, and the student's response to the first.

    ``log_probs``: of the response's tokens, nats, where another program sampled it; not recorded.
    """

    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None


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


def read_rollouts(path: str, vocab_size: int | None) -> list[Rollout]:
    """All rollouts of a replay file, in file order; fields other than the three are ignored.

    Raises:
        ValueError: names the file and line of the first mistake.
    """
    rollouts = [
        Rollout(*(_ids(content, name, vocab_size, f"{path}:{number}") for name in _FIELDS))
        for number, content in read_jsonl(path, "--replay-file")
    ]
    if not rollouts:
        raise ValueError(f"--replay-file {path}: no rollouts in it")
    return rollouts


def rollout_to_json(rollout: Rollout) -> dict[str, list[int]]:
    """The line of a replay file."""
    return {name: list(getattr(rollout, name)) for name in _FIELDS}


def is_rollout(line: str) -> bool:
    """Whether a line is one of a replay file."""
    try:
        return set(_FIELDS) <= set(json.loads(line))
    except (ValueError, TypeError):
        return False
