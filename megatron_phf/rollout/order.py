"""Which problems a step asks, and what room their responses have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_phf.config.settings import Config
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.rollouts import Rollout
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import Models


def problem_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch (from 0) takes ``count`` problems."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 2**32 + epoch]))
    return generator.permutation(count)


class ProblemOrder:
    """Which problems a step takes: seeded, each epoch another permutation.

    ``per_problem`` samples in a row are of one problem; a step has ``global_batch_size`` samples.
    """

    def __init__(
        self,
        pairs: Sequence[PromptPair],
        global_batch_size: int,
        seed: int,
        per_problem: int = 1,
    ) -> None:
        self._pairs, self._batch, self._seed = pairs, global_batch_size, seed
        self._per_problem = per_problem
        self._known: dict[int, np.ndarray] = {}

    def share(self, iteration: int) -> tuple[list[int], list[PromptPair]]:
        """Sample ids (over the whole run) and prompts of this data-parallel rank's share."""
        first = (iteration - 1) * self._batch
        sample_ids = parallel.local_share(range(first, first + self._batch))
        pairs = [self._pairs[self._problem_of(i)].at(iteration) for i in sample_ids]
        return list(sample_ids), pairs

    def _problem_of(self, sample_id: int) -> int:
        epoch, position = divmod(sample_id // self._per_problem, len(self._pairs))
        if epoch not in self._known:  # of the last one alone: it is as long as the data
            self._known = {epoch: problem_permutation(len(self._pairs), self._seed, epoch)}
        return int(self._known[epoch][position])


def problem_order(config: Config, pairs: Sequence[PromptPair]) -> ProblemOrder:
    """The order of the run."""
    train = config.train
    return ProblemOrder(
        pairs, train.global_batch_size, train.seed, config.rollout.rollouts_per_problem
    )


@dataclass(frozen=True)
class ResponseRoom:
    """Both models must be able to read a whole response behind their prompts.

    ``student``, ``teacher``: where their positions end; ``max_new_tokens``: of any response.
    """

    student: int
    teacher: int
    max_new_tokens: int

    def of(self, pair: PromptPair) -> int:
        """Tokens that a response to these prompts can have."""
        behind = (self.student - len(pair.student_ids), self.teacher - len(pair.teacher_ids))
        return min(*behind, self.max_new_tokens)


def response_room(config: Config, models: Models) -> ResponseRoom:
    """Where student and teacher, which may be another model, end a response."""
    student, teacher = (m.max_position_embeddings for m in (models.student, models.teacher))
    return ResponseRoom(student, teacher, config.rollout.max_new_tokens)


def asked(
    pairs: Sequence[PromptPair],
    room: ResponseRoom,
    sampling: SamplingParams,
    sample_ids: Sequence[int],
) -> tuple[list[Sequence[int]], SamplingParams, Sequence[int], list[int]]:
    """What an engine is asked for these prompts: the arguments of ``RolloutEngine.generate``."""
    prompts: list[Sequence[int]] = [pair.student_ids for pair in pairs]
    return prompts, sampling, sample_ids, [room.of(pair) for pair in pairs]


def as_rollout(pair: PromptPair, response: Response) -> Rollout:
    """A response behind its problem's prompts."""
    logs, mask = response.log_probs, response.mask
    return Rollout(
        pair.student_ids,
        pair.teacher_ids,
        tuple(response.token_ids),
        None if logs is None else tuple(logs),
        None if mask is None else tuple(mask),
        response.policy_version,
        response.policy_version_end,
        reference=pair.problem.solution or None,
        teacher=pair.problem.teacher,
    )
