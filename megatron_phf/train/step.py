"""One training step: rollouts -> teacher targets -> student -> optimizer -> teacher update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden.spec import flow_spec
from megatron_phf.hidden.tap import make_flow_tap, set_flow_tap
from megatron_phf.losses import OBJECTIVES
from megatron_phf.model.gpt import FlowGPTModel, sequence_shards
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import Models, layer_map
from megatron_phf.teacher.kinds import Teacher
from megatron_phf.train.batch import StepBatch, make_batch
from megatron_phf.train.metrics import PhaseTimer, StepMetrics, summarize
from megatron_phf.train.nonfinite import NonfiniteSteps
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.student_pass import StudentOutput, StudentPass
from megatron_phf.train.teacher_pass import TeacherPass


class Distiller:
    """Student, teacher and optimizer, and the step that trains one on the other."""

    def __init__(
        self,
        config: Config,
        models: Models,
        student: list[FlowGPTModel],
        teacher: Teacher,
        optimizer: StudentOptimizer,
    ) -> None:
        self.config, self.models, self.arch = config, models, models.student
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.nonfinite = NonfiniteSteps(config)
        self.shards = sequence_shards(student[0].config)
        method = config.method
        layers = layer_map(config, self.arch.num_layers, teacher.chunks[0].config.num_layers)
        self.tap = make_flow_tap(
            student, teacher.chunks, layers, method.phf_window_size, flow_spec(config), self.shards
        )
        flow = self.tap if method.phf_alpha > 0 else None
        set_flow_tap(student, flow)
        set_flow_tap(teacher.chunks, flow)
        weighs = method.token_weighting in ("teacher_entropy", "divergence_top_p")
        scores = OBJECTIVES[method.opsd_objective].reads_teacher or weighs
        self.teacher_pass = TeacherPass(teacher, flow, self.shards, scores)
        self.student_pass = StudentPass(config, models, student, optimizer, flow, self.shards)

    def step(self, iteration: int, rollouts: Sequence[Rollout], timer: PhaseTimer) -> StepMetrics:
        """Train on this data-parallel rank's ``rollouts``.

        A step whose loss or gradient is not finite changes nothing; its metrics say so.

        Raises:
            ValueError: too many of those in a row; the samples were written to a file.
        """
        batch = make_batch(rollouts, self.config, self.shards)
        with timer.phase("teacher"):
            targets = self.teacher_pass(batch)
        self._seed_dropout(iteration)
        with timer.phase("student"):
            student = self.student_pass(batch, targets)
        del targets  # with it goes the output head of an offloaded teacher
        finite = self._finite(iteration, rollouts, student, batch)
        with timer.phase("optimizer"):
            # None of the rollouts may be kept.
            learning_rate, grad_norm = self._update(finite and student.num_tokens > 0)
        return self.metrics(student, learning_rate, grad_norm)

    def _seed_dropout(self, iteration: int) -> None:
        if self.config.lora.lora_dropout > 0:
            parallel.seed_dropout(self.config.train.seed, iteration)

    def _finite(
        self, iteration: int, rollouts: Sequence[Rollout], student: StudentOutput, batch: StepBatch
    ) -> bool:
        """Whether losses and gradients are, on every rank."""
        finite = self.optimizer.gradients_finite()
        return not self.nonfinite.must_skip(
            iteration, rollouts, student.outputs, self.tap.values, finite, batch.order
        )

    def _update(self, changes: bool) -> tuple[float, float]:
        """Student and teacher; (learning rate, gradient norm), NaN where nothing changed."""
        if not changes:
            return self.optimizer.learning_rate, math.nan
        learning_rate, grad_norm = self.optimizer.step()
        self.teacher.update(self.student)
        return learning_rate, grad_norm

    def metrics(
        self, student: StudentOutput, learning_rate: float, grad_norm: float
    ) -> StepMetrics:
        """The step's numbers, reduced over the world; every rank calls it."""
        layers = self.arch.num_layers
        metrics = summarize(
            *(student.outputs, layers, self.config, learning_rate, grad_norm, self.tap),
            student.num_sequences,
        )
        return dataclasses.replace(metrics, extra=student.extra)
