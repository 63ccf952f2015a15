"""Average@k: sample k answers to each held-out problem and grade them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist

from megatron_phf import parallel
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.grading import average_at_k, bootstrap_interval, is_correct
from megatron_phf.rollout import RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """``average`` = Average@k; ``interval``: 95 % bootstrap over problems; ``correct`` [p][k]."""

    average: float
    interval: tuple[float, float]
    correct: list[list[bool]]
    sample: str  # the first problem's first generation, to look at


def evaluate(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    pairs: Sequence[PromptPair],
    sampling: SamplingParams,
    k: int,
) -> Evaluation:
    """Sample and grade ``k`` answers to each student prompt; every rank gets the whole result.

    The samples are spread over data-parallel ranks; which rank draws one does not change it.
    """
    samples = [(problem, draw) for problem in range(len(pairs)) for draw in range(k)]
    mine = samples[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    responses = engine.generate(
        [pairs[problem].student_ids for problem, _ in mine],
        sampling,
        [problem * k + draw for problem, draw in mine],
    )
    graded = []
    for (problem, draw), response in zip(mine, responses, strict=True):
        text = tokenizer.decode(response)
        answer = pairs[problem].problem.answer
        assert answer is not None, "evaluation sets have answers"
        graded.append((problem, draw, is_correct(text, answer), text))
    return _collect(graded, len(pairs), k)


def _collect(graded: list[tuple[int, int, bool, str]], num_problems: int, k: int) -> Evaluation:
    correct = [[False] * k for _ in range(num_problems)]
    sample = ""
    gathered: list[list[tuple[int, int, bool, str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, graded)
    for problem, draw, good, text in (g for share in gathered for g in share):
        correct[problem][draw] = good
        sample = text if (problem, draw) == (0, 0) else sample
    per_problem = [sum(row) / k for row in correct]
    return Evaluation(average_at_k(correct), bootstrap_interval(per_problem), correct, sample)
