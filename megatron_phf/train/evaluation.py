"""Evaluation during training: when, and what of it stays on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import append_jsonl, keep_lines
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.evaluation.evaluate import Evaluation, TestSet, evaluate
from megatron_phf.evaluation.grading import Grader
from megatron_phf.rollout.protocol import RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.logging import say
from megatron_phf.train.run_files import step_of

_SHOWN = 4  # problems whose generations are kept to look at


class EvaluationLog:
    """``evaluations.jsonl`` of a run: one object an evaluation.  Rank 0 writes, all know."""

    def __init__(self, directory: str, done: int = 0) -> None:
        """``done``: steps of a run that is resumed; later evaluations are forgotten."""
        self._path = os.path.join(directory, "evaluations.jsonl")
        self.averages = on_first_rank(self._begin, done)

    def _begin(self, done: int) -> dict[int, float]:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        keep_lines(
            self._path,
            lambda number, line: bool(done) and 0 <= step_of(line) <= done,
            lambda line: step_of(line) >= 0,
        )
        with open(self._path, encoding="utf-8") as f:
            return {o["step"]: o["average_at_k"] for o in map(json.loads, f)}

    def add(self, step: int, evaluation: Evaluation) -> None:
        """Record the evaluation after ``step`` steps."""
        self.averages[step] = evaluation.average
        on_first_rank(append_jsonl, self._path, [{"step": step, **evaluation.record(_SHOWN)}])

    def describe(self) -> str:
        """Best and last, in one line."""
        best, last = max(self.averages, key=lambda s: self.averages[s]), max(self.averages)
        return (
            f"evaluation: best {100 * self.averages[best]:.2f} % after step {best}, "
            f"last {100 * self.averages[last]:.2f} % after step {last}"
        )


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the student that ``engine`` samples from."""

    config: Config
    engine: RolloutEngine
    tokenizer: Tokenizer
    tests: TestSet
    sampling: SamplingParams
    grader: Grader
    log: EvaluationLog
    report: Callable[[int, dict[str, Any]], None] = lambda step, values: None

    def run(self) -> Evaluation:
        """Evaluate now."""
        k = self.config.evaluation.eval_samples
        return evaluate(self.engine, self.tokenizer, self.tests, self.sampling, k, self.grader)

    def after(self, step: int) -> None:
        """Evaluate if it is time to after ``step`` steps and has not been done before."""
        interval, total = self.config.evaluation.eval_interval, self.config.train.train_iters
        due = step in (0, total) or (interval > 0 and step % interval == 0)
        if not due or step in self.log.averages:
            return
        result = self.run()
        self.log.add(step, result)
        say(f"evaluation after step {step}: {result.describe()}, {result.seconds:.0f} s")
        values = {"average_at_k": result.average, "pass_at_k": result.pass_at_k}
        self.report(step, {**values, "majority_at_k": result.majority_at_k})
