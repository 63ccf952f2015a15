"""Average@k, pass@k and majority@k: sample k answers to each problem and grade them."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import Problem, field_names, read_test_problems
from megatron_phf.data.prompts import PromptTemplates, fill, problem_prompts, prompt_templates
from megatron_phf.data.rollouts import written_stop
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.data.unknown import unknown_tokens
from megatron_phf.evaluation.answers import same_answer
from megatron_phf.evaluation.grading import (
    Grader,
    average_at_k,
    bootstrap_interval,
    canonical_answer,
)
from megatron_phf.rollout.protocol import RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel


@dataclass(frozen=True)
class Answer:
    """One sampled answer; ``cut``: it ended without a stop token, for want of room."""

    text: str
    tokens: int
    answer: str | None  # its final answer, in the form that majority@k counts
    correct: bool
    cut: bool


@dataclass(frozen=True)
class Evaluation:
    """``answers`` [problems][k]."""

    problems: list[Problem]
    answers: list[list[Answer]]
    seconds: float

    @property
    def correct(self) -> list[list[bool]]:
        """[problems][k]."""
        return [[a.correct for a in row] for row in self.answers]

    @property
    def per_problem(self) -> list[float]:
        """Mean correctness of each problem's samples."""
        return [sum(row) / len(row) for row in self.correct]

    @property
    def average(self) -> float:
        """Average@k: the mean over problems of the mean over samples."""
        return average_at_k(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of ``average`` over problems."""
        return bootstrap_interval(self.per_problem)

    @property
    def pass_at_k(self) -> float:
        """Share of the problems that any sample solves."""
        return sum(map(any, self.correct)) / len(self.answers)

    @property
    def majority_at_k(self) -> float:
        """Share of the problems whose most frequent final answer is right."""
        votes = [majority([a.answer for a in row]) for row in self.answers]
        return sum(
            vote is not None and row[vote].correct
            for vote, row in zip(votes, self.answers, strict=True)
        ) / len(votes)

    def record(self, shown: int | None = None) -> dict[str, Any]:
        """As JSON: the numbers, and the first answer to each of ``shown`` problems (None: all)."""
        samples = [
            {
                "problem": problem.problem,
                "reference": problem.solution,
                "answer": problem.answer,
                "generation": row[0].text,
                "correct": row[0].correct,
            }
            for problem, row in zip(self.problems[:shown], self.answers, strict=False)
        ]
        flat = [a for row in self.answers for a in row]
        return {
            "k": len(self.answers[0]),
            "problems": len(self.problems),
            "average_at_k": self.average,
            "interval_95": list(self.interval),
            "pass_at_k": self.pass_at_k,
            "majority_at_k": self.majority_at_k,
            "mean_tokens": sum(a.tokens for a in flat) / len(flat),
            "cut": sum(a.cut for a in flat) / len(flat),
            "correct": self.correct,
            "seconds": round(self.seconds, 3),
            "samples": samples,
        }

    def describe(self) -> str:
        """One line."""
        (low, high), k = self.interval, len(self.answers[0])
        return (
            f"Average@{k} {100 * self.average:.2f} % (95 % interval {100 * low:.2f} - "
            f"{100 * high:.2f}), pass@{k} {100 * self.pass_at_k:.2f} %, majority@{k} "
            f"{100 * self.majority_at_k:.2f} %, {len(self.problems)} problems"
        )


def majority(answers: Sequence[str | None]) -> int | None:
    """Position of the first sample with the most frequent answer; the earliest wins a tie.

    Answers are one where ``same_answer`` says so.  Samples without an answer have no vote; None
    where no sample has one.
    """
    votes = Counter[str]()
    for text, count in Counter(answer for answer in answers if answer is not None).items():
        first = next((earlier for earlier in votes if same_answer(text, earlier)), text)
        votes[first] += count
    return answers.index(votes.most_common(1)[0][0]) if votes else None


@dataclass(frozen=True)
class TestSet:
    """Problems with answers, and how each is asked; ``unknown``: a warning about the prompts."""

    problems: list[Problem]
    prompts: list[list[int]]
    unknown: str | None = None

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(prompt) for prompt in self.prompts)


def make_test_set(
    problems: list[Problem],
    tokenizer: Tokenizer,
    templates: PromptTemplates,
    thinking: bool,
    max_prompt_length: int,
    name: str,
) -> TestSet:
    """The student's prompts of ``problems``; ``name`` is their file, for errors.

    Raises:
        ValueError: a prompt is too long.  To leave problems out would change the result.
    """
    prompts = problem_prompts(tokenizer, templates.student, thinking, problems)
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) > max_prompt_length:
            raise ValueError(
                f"{name}: problem {problem.index + 1} has {len(prompt)} tokens, over "
                f"--max-prompt-length {max_prompt_length}; raise it"
            )
    return TestSet(problems, prompts)


def read_test_set(path: str, flag: str, config: Config, tokenizer: Tokenizer) -> TestSet:
    """The test set in a file named by ``flag``; ValueError names what is wrong with it."""
    data, templates = config.data, prompt_templates(config.data)
    tests = make_test_set(
        read_test_problems(path, field_names(data), flag),
        tokenizer,
        templates,
        config.evaluation.eval_thinking,
        data.max_prompt_length,
        f"{flag} {path}",
    )
    messages = (fill(templates.student, problem) for problem in tests.problems)
    unknown = unknown_tokens(tokenizer, messages, tests.prompts)
    return dataclasses.replace(tests, unknown=unknown and f"{flag} {path}: {unknown}")


def evaluation_sampling(
    config: Config, stop_ids: tuple[int, ...], max_new_tokens: int
) -> SamplingParams:
    """The --eval settings; ``max_new_tokens``: what the model's positions leave room for."""
    e = config.evaluation
    wanted = e.eval_max_new_tokens or config.rollout.max_new_tokens
    return SamplingParams(
        temperature=e.eval_temperature,
        top_p=e.eval_top_p,
        top_k=e.eval_top_k,
        max_new_tokens=min(wanted, max_new_tokens),
        stop_ids=stop_ids,
        seed=e.eval_seed,
    )


def evaluate(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    tests: TestSet,
    sampling: SamplingParams,
    k: int,
    grader: Grader,
    first: int = 0,
) -> Evaluation:
    """Sample and grade ``k`` answers to each problem; every rank gets the whole result.

    The samples are spread over data-parallel ranks; which rank draws one does not change it.
    ``first``: position of the first problem in the whole test set, of which this may be a part.
    """
    start = time.perf_counter()
    samples = [(problem, draw) for problem in range(len(tests.prompts)) for draw in range(k)]
    mine = samples[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    responses = engine.generate(
        [tests.prompts[problem] for problem, _ in mine],
        sampling,
        [(first + problem) * k + draw for problem, draw in mine],
    )
    graded: dict[tuple[int, int], Answer] = {}
    if parallel.decides_for_model():  # its other ranks have the same responses
        for (problem, draw), response in zip(mine, responses, strict=True):
            ids = response.token_ids
            text = tokenizer.decode(ids)
            good = grader.correct(text, tests.problems[problem])
            cut = not written_stop(ids, response.mask, sampling.stop_ids)
            answer = Answer(text, len(ids), canonical_answer(text), good, cut)
            graded[problem, draw] = answer
    for part in parallel.gather_objects(graded):
        graded.update(part)
    answers = [[graded[p, draw] for draw in range(k)] for p in range(len(tests.prompts))]
    return Evaluation(tests.problems, answers, time.perf_counter() - start)


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of the parts of a test set as one."""
    whole = parts[0]
    for part in parts[1:]:
        whole = Evaluation(
            whole.problems + part.problems,
            whole.answers + part.answers,
            whole.seconds + part.seconds,
        )
    return whole
