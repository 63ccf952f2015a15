"""The job of ``tools/evaluate.py``: a model on one or several test sets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import field_names, read_test_problems
from megatron_phf.evaluation.evaluate import (
    Evaluation,
    TestSet,
    evaluate,
    evaluation_sampling,
    joined,
    read_test_set,
)
from megatron_phf.evaluation.generations import GenerationStore, read_generations
from megatron_phf.evaluation.grading import Grader, canonical_answer, make_grader
from megatron_phf.files.foreign import read_json_object
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.context import Prompts, RolloutContext
from megatron_phf.rollout.engines import engine_row
from megatron_phf.rollout.megatron.engine import student_engine
from megatron_phf.rollout.protocol import RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.sources import make_engine
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.teacher.architecture import read_models
from megatron_phf.train.build import job_tokenizer, load_student, run_moment
from megatron_phf.train.checkpoint_files import newest_weights
from megatron_phf.train.checkpoint_inputs import inputs
from megatron_phf.train.logging import say
from megatron_phf.weights.sharded import load_weights


def evaluate_sets(config: Config, files: dict[str, str]) -> None:
    """Sample, grade, keep and print; every rank calls it.

    Args:
        files: name of each test set and its JSONL.

    Raises:
        ValueError: a file is damaged, or --output-dir cannot be written or is another's.
    """
    student = _Student(config, files)
    with make_grader(config.evaluation.grader) as grader:
        results = {name: student.evaluate(name, file, grader) for name, file in files.items()}
    _print_table(results, say)


def regrade(config: Config, files: dict[str, str]) -> None:
    """Grade the recorded generations of --replay-file anew, and print; one process, no model.

    Raises:
        ValueError: they are not those of the test set's problems.
    """
    path = config.rollout.replay_file
    if path is None or len(files) != 1:
        raise ValueError("--rollout-engine replay needs --replay-file, and one test set")
    (name, file), data = next(iter(files.items())), config.data
    fields = field_names(data)
    problems = read_test_problems(file, fields, "--eval-data")
    recorded = read_generations(path, "--replay-file")
    if [p.problem for p in problems] != [text for text, _ in recorded]:
        raise ValueError(f"--replay-file {path}: not the problems of {file}, in order")
    with make_grader(config.evaluation.grader) as grader:
        answers = [
            [
                dataclasses.replace(
                    answer,
                    answer=canonical_answer(answer.text),
                    correct=grader.correct(answer.text, problem),
                )
                for answer in row
            ]
            for problem, (_, row) in zip(problems, recorded, strict=True)
        ]
    _print_table({name: Evaluation(problems, answers, 0.0)}, print)


def _print_table(results: dict[str, Evaluation], say: Callable[[str], Any]) -> None:
    for name, result in results.items():
        say(f"{name:<12} {result.describe()}")
    if len(results) > 1:
        mean = sum(result.average for result in results.values()) / len(results)
        say(f"{'mean':<12} Average@k {100 * mean:.2f} %")


class _Student:
    """The model, and what samples from it."""

    def __init__(self, config: Config, files: dict[str, str]) -> None:
        self._config, directory = config, config.model.hf_model
        assert directory is not None
        self._models = read_models(config)
        self._arch = self._models.student
        self._tokenizer, self._stop_ids, self._rendering = job_tokenizer(
            config, self._arch.vocab_size, _moment(config, files)
        )
        self._tests = {
            name: read_test_set(file, "--eval-data", config, self._tokenizer)
            for name, file in files.items()
        }
        prompts = Prompts(self._tokenizer, [], self._stop_ids)
        context = RolloutContext(config, self._models, prompts, lambda: self._load(directory))
        self._engine = self._make_engine(context)
        self._engine.prepare(1)  # a server gets these weights, and keeps them

    def _load(self, directory: str) -> list[FlowGPTModel]:
        chunks = load_student(self._arch, self._config, directory)
        if self._config.checkpoint.load is not None:
            load_weights(chunks, newest_weights(self._config.checkpoint.load))
        return chunks

    def _make_engine(self, context: RolloutContext) -> RolloutEngine:
        """That of the flags; where they name one that does not sample, the one in process."""
        if engine_row(self._config.rollout.rollout_engine).samples:
            return make_engine(context)
        return student_engine(self._config, self._models, context.student)

    def evaluate(self, name: str, file: str, grader: Grader) -> Evaluation:
        """One test set, part by part, from where an earlier start ended."""
        config = self._config
        tests = self._tests[name]
        if tests.unknown is not None:
            say(f"warning  {tests.unknown}")
        room = self._arch.max_position_embeddings - tests.longest_prompt
        sampling = evaluation_sampling(config, self._stop_ids, room)
        settings = _settings(config, file, sampling)
        if self._tokenizer.says_the_date:
            settings["moment"] = self._rendering["moment"]
        stores, parts = _open_store(name, settings, config, tests)
        k, total = config.evaluation.eval_samples, len(tests.problems)
        # As many at once as the ranks generate together.
        together = config.rollout.rollout_batch_size * parallel.data_parallel_size()
        size = max(1, together // k)
        for start in range(len(parts), total, size):
            end = min(start + size, total)
            part = TestSet(tests.problems[start:end], tests.prompts[start:end])
            parts.append(evaluate(self._engine, self._tokenizer, part, sampling, k, grader, start))
            on_first_rank(lambda: stores[0].add(parts[-1]))
            say(f"{name}: {end}/{total} problems, {joined(parts).describe()}")
        whole = joined(parts)
        on_first_rank(lambda: stores[0].finish(whole))
        return whole


def _moment(config: Config, files: dict[str, str]) -> datetime:
    """What the chat template reads as now: as an evaluation here, or the run of --load, had it."""

    def recorded() -> str | None:
        for name in files:
            path = Path(config.output.output_dir, name, "settings.json")
            if path.is_file():
                return read_json_object(str(path)).get("moment")
        return None

    moment = on_first_rank(recorded)
    return run_moment(config.checkpoint.load) if moment is None else datetime.fromisoformat(moment)


def _open_store(
    name: str, settings: dict[str, Any], config: Config, tests: TestSet
) -> tuple[list[GenerationStore], list[Evaluation]]:
    """Rank 0's store of the test set, of which others have none; on every rank what is in it."""
    opened: list[GenerationStore] = []

    def done() -> list[Evaluation]:
        opened.append(GenerationStore(os.path.join(config.output.output_dir, name), settings))
        return opened[0].done(tests.problems)

    parts = on_first_rank(done)
    if parts:
        say(f"{name}: {len(parts)} problems were done before")
    return opened, parts


def _settings(config: Config, file: str, sampling: SamplingParams) -> dict[str, Any]:
    """What makes two evaluations the same one."""
    evaluation = dataclasses.replace(config.evaluation, eval_data=Path(file).name)
    return {
        "inputs": inputs(config.replaced(data=file)),
        "load": config.checkpoint.load,
        "lora_adapter": config.lora.lora_adapter,
        "evaluation": dataclasses.asdict(evaluation),
        "sampling": dataclasses.asdict(sampling),
    }
