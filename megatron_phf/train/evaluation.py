"""Evaluation during training: when, and what of it stays on the disk."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import keep_lines
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.evaluation.evaluate import (
    Evaluation,
    TestSet,
    evaluate,
    evaluation_sampling,
    read_test_set,
)
from megatron_phf.evaluation.grading import make_grader
from megatron_phf.files.appended import AppendedLines
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.megatron.engine import student_engine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.teacher.architecture import Models
from megatron_phf.train.hooks import RunHook
from megatron_phf.train.logging import RunLogger, say
from megatron_phf.train.run_files import step_of

_SHOWN = 4  # problems whose generations are kept to look at


class EvaluationLog:
    """``evaluations.jsonl`` of a run: one object an evaluation.  Rank 0 writes, all know."""

    def __init__(self, directory: str, done: int = 0) -> None:
        """``done``: steps of a run that is resumed; later evaluations are forgotten."""
        self._path = os.path.join(directory, "evaluations.jsonl")
        self._lines = AppendedLines(self._path, "evaluations")
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
        line = {"step": step, **evaluation.record(_SHOWN)}
        if parallel.is_first_rank() and (warning := self._lines.add([line])):
            say(warning)

    def problem(self) -> str | None:
        """What the disk has not taken in the end; every rank calls it."""
        return on_first_rank(self._lines.last_problem)

    def describe(self) -> str:
        """Best and last, in one line."""
        if not self.averages:
            return "evaluation: none"
        best, last = max(self.averages, key=lambda s: self.averages[s]), max(self.averages)
        return (
            f"evaluation: best {100 * self.averages[best]:.2f} % after step {best}, "
            f"last {100 * self.averages[last]:.2f} % after step {last}"
        )


@dataclass(frozen=True)
class Questions:
    """The test set of ``--eval-data``, and how it is asked."""

    tests: TestSet
    tokenizer: Tokenizer
    sampling: SamplingParams


def read_questions(
    config: Config, models: Models, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> Questions:
    """Those of ``--eval-data``; ValueError names what is wrong with them."""
    assert config.evaluation.eval_data is not None
    tests = read_test_set(config.evaluation.eval_data, "--eval-data", config, tokenizer)
    if tests.unknown is not None:
        say(f"warning  {tests.unknown}")
    room = models.student.max_position_embeddings - tests.longest_prompt
    return Questions(tests, tokenizer, evaluation_sampling(config, stop_ids, room))


class Evaluations(RunHook):
    """Average@k on ``--eval-data``: before the first step, where it is time to, after the last."""

    def __init__(
        self,
        config: Config,
        models: Models,
        student: list[FlowGPTModel],
        questions: Questions,
        logger: RunLogger,
        heartbeat: Heartbeat,
        done: int,
    ) -> None:
        """``done``: steps of a run that is resumed."""
        self._settings, self._questions = config.evaluation, questions
        self._logger, self._heartbeat = logger, heartbeat
        self._engine = student_engine(config, models, student)
        self._log = EvaluationLog(config.output.output_dir, done)
        self._closing = contextlib.ExitStack()
        self._grader = self._closing.enter_context(make_grader(config.evaluation.grader))

    def before_step(self, iteration: int) -> None:
        """Evaluate what the steps before have made, if it is time to."""
        done, interval = iteration - 1, self._settings.eval_interval
        if done == 0 or (interval > 0 and done % interval == 0):
            self._evaluate(done)

    def at_end(self, iteration: int, stopped: bool) -> str | None:
        """Evaluate what is exported."""
        if not stopped:
            self._evaluate(iteration)
        say(self._log.describe())
        return self._log.problem()

    def close(self) -> None:
        """End the grader's process."""
        self._closing.close()

    def _evaluate(self, step: int) -> None:
        if step in self._log.averages:
            return
        self._heartbeat.at(f"step {step}, evaluation")
        q, k = self._questions, self._settings.eval_samples
        result = evaluate(self._engine, q.tokenizer, q.tests, q.sampling, k, self._grader)
        self._log.add(step, result)
        say(f"evaluation after step {step}: {result.describe()}, {result.seconds:.0f} s")
        values = {"average_at_k": result.average, "pass_at_k": result.pass_at_k}
        self._logger.evaluation(step, {**values, "majority_at_k": result.majority_at_k})
