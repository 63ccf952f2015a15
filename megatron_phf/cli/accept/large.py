"""The model that is measured, and what trains it and samples from it: the product's own parts."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.rollout.megatron.engine import MegatronRollouts, student_engine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import read_models
from megatron_phf.teacher.kinds import Teacher, make_teacher
from megatron_phf.train.build import load_student
from megatron_phf.train.metrics import PhaseTimer
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.step import Distiller


class Large:
    """A student; where steps are asked for also its teacher and optimizer.  One global batch."""

    def __init__(self, config: Config, case: dict[str, Any]) -> None:
        assert config.model.hf_model is not None
        self.config, self.case = config, case
        self.models = read_models(config)
        self.arch = self.models.student
        parallel.initialize(config.parallel)
        self.student = load_student(self.arch, config, config.model.hf_model)
        self._steps = 0

    @functools.cached_property
    def _trained(self) -> tuple[Teacher, StudentOptimizer]:
        teacher = make_teacher(self.student, self.models, self.config)
        return teacher, StudentOptimizer(self.student, self.config)

    @functools.cached_property
    def rollouts(self) -> list[Rollout]:
        """This data-parallel rank's."""
        generator, c = random.Random(parallel.data_parallel_rank()), self.case

        def ids(length: int) -> tuple[int, ...]:
            return tuple(generator.choices(range(self.arch.vocab_size), k=length))

        return [
            Rollout(ids(c["prompt"]), ids(c["teacher_prompt"]), ids(c["response"]))
            for _ in range(c["batch"] // parallel.data_parallel_size())
        ]

    def engine(self, graphs: str, rows: int) -> MegatronRollouts:
        """What samples in process, with ``--decode-cuda-graphs`` as given."""
        config = self.config.replaced(decode_cuda_graphs=graphs, rollout_batch_size=rows)
        return student_engine(config, self.models, self.student)

    def distiller(self, flow: bool = True) -> Distiller:
        """With the flow loss or without, around the same models and optimizer."""
        config = self.config if flow else self.config.replaced(phf_alpha=0.0)
        return Distiller(config, self.models, self.student, *self._trained)

    def step(self, distiller: Distiller, timer: PhaseTimer | None = None) -> PhaseTimer:
        """One more of them."""
        timer, self._steps = timer or PhaseTimer(), self._steps + 1
        distiller.step(self._steps, self.rollouts, timer)
        return timer

    def sample(self) -> None:
        """The rollouts anew; no token stops one, so that all are as long."""
        prompts = [rollout.student_prompt_ids for rollout in self.rollouts]
        sampling = SamplingParams(1.1, 0.95, 20, self.case["response"], (), self._steps)
        engine = self.engine("auto", len(prompts))
        responses = engine.generate(prompts, sampling, range(len(prompts)))
        self.rollouts = [
            dataclasses.replace(rollout, response_ids=tuple(response.token_ids))
            for rollout, response in zip(self.rollouts, responses, strict=True)
        ]
