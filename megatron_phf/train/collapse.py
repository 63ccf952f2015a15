"""Signs that a student collapses, measured each step; --stop-on-collapse ends the run at one.

What users of on-policy self-distillation meet after some hundred steps, and RLCSD
(arXiv:2606.11709) describes: responses shrink or grow, the student is sure of everything or of
nothing, it copies the reference's words, and it departs from its teacher.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.settings import Config, flag_of
from megatron_phf.data.rollouts import Rollout
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.hooks import RunHook, Stop
from megatron_phf.train.metrics import StepMetrics

_WORD = re.compile(r"\w+")


def copied_words(rollouts: Sequence[Rollout], tokenizer: Tokenizer | None) -> float | None:
    """Share of the reference solution's words that are in the response, as often: ROUGE-1 recall.

    Mean over the global batch, None where no solution or tokenizer is known; every rank calls it.
    """
    local = []
    for rollout in rollouts if tokenizer is not None else ():
        wanted = Counter(_WORD.findall((rollout.reference or "").casefold()))
        if wanted:
            assert tokenizer is not None
            text = tokenizer.decode(rollout.response_ids).casefold()
            local.append((wanted & Counter(_WORD.findall(text))).total() / wanted.total())
    shares = [share for part in parallel.gather_over_data_parallel(local) for share in part]
    return sum(shares) / len(shares) if shares else None


@dataclass(frozen=True)
class Sign:
    """One sign: ``value`` of a step's metrics, and the threshold that it must not pass.

    ``first``: the mean of the last steps is divided by that of the run's first ones, and speaks of
    collapse below the threshold or above 1 / threshold; else the share itself, above it
    (``most``) or below.  A threshold of 0 is off.
    """

    says: str
    field: str
    value: Callable[[dict[str, Any]], float | None]
    first: bool = False
    most: bool = False

    def problem(self, level: float, threshold: float) -> str | None:
        """What is wrong with ``level``, as text."""
        flag = f"{flag_of(self.field)} {threshold:g}"
        if not threshold:
            return None
        if self.first and not threshold <= level <= 1 / threshold:
            return f"outside {threshold:g} to {1 / threshold:g} times ({flag})"
        if not self.first and (level > threshold if self.most else level < threshold):
            return f"{'above' if self.most else 'below'} {flag}"
        return None


SIGNS = {
    "length": Sign(
        "response length",
        "collapse_length",
        lambda step: (step.get("rollout_lengths") or {}).get("mean"),
        first=True,
    ),
    "entropy": Sign(
        "the student's entropy", "collapse_entropy", lambda s: s.get("student_entropy"), first=True
    ),
    "copying": Sign(
        "the share of the reference's words in the responses",
        "collapse_copying",
        lambda step: step.get("copied_words"),
        most=True,
    ),
    "agreement": Sign(
        "agreement of student and teacher",
        "collapse_agreement",
        lambda step: step.get("teacher_agreement"),
    ),
}


class CollapseSigns(RunHook):
    """Their levels over the last steps; those of the first ones are in the checkpoints.

    ``fired``: the reason why no checkpoint is to be written any more.
    """

    def __init__(self, config: Config) -> None:
        self._settings = config.collapse
        self._first: dict[str, list[float]] = {name: [] for name in SIGNS}
        self._last: dict[str, list[float]] = {name: [] for name in SIGNS}
        self.fired: str | None = None

    def add(self, metrics: StepMetrics) -> dict[str, float]:
        """Take a step; the levels now, where known."""
        step, count = metrics.as_json(), self._settings.collapse_steps
        for name, sign in SIGNS.items():
            value = sign.value(step)
            if value is not None and math.isfinite(value):
                if len(self._first[name]) < count:
                    self._first[name].append(value)
                self._last[name] = [*self._last[name], value][-count:]
        levels = {name: self._level(name) for name in SIGNS if self._last[name]}
        return {name: level for name, level in levels.items() if level is not None}

    def _level(self, name: str) -> float | None:
        now = _mean(self._last[name])
        if not SIGNS[name].first:
            return now
        before = _mean(self._first[name])
        return now / before if before else None

    def after_step(self, iteration: int, metrics: StepMetrics) -> Stop | None:
        """With --stop-on-collapse: a sign that fires, seen on rank 0, is every rank's reason."""
        if self._settings.stop_on_collapse:
            self.fired = on_first_rank(self._problem)
        return None if self.fired is None else Stop(self.fired)

    def _problem(self) -> str | None:
        count = self._settings.collapse_steps
        for name, sign in SIGNS.items():
            level = self._level(name) if len(self._last[name]) == count else None
            threshold = getattr(self._settings, sign.field)
            problem = None if level is None else sign.problem(level, threshold)
            if problem is None:
                continue
            now = f"{_mean(self._last[name]):.4g} over the last {count} step(s)"
            if sign.first:
                first = f"{_mean(self._first[name]):.4g}"
                now += f", {level:.3g} times the first {count}'s {first}"
            return f"--stop-on-collapse: {sign.says} is {now}, {problem}"
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""
        return {"first": self._first, "last": self._last}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state`; nothing of checkpoints that have none of it."""
        for name in SIGNS:
            self._first[name] = [*state.get("first", {}).get(name, [])]
            self._last[name] = [*state.get("last", {}).get(name, [])]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
