"""One training step: rollouts -> teacher targets -> student -> optimizer -> teacher update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_phf import device, parallel
from megatron_phf.config import Config
from megatron_phf.data.batch import LocalBatch, SequenceBatch, flow_window, make_local_batch
from megatron_phf.data.replay_file import Rollout
from megatron_phf.losses import DivergenceSpec, chunked_divergence
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.flow_tap import FlowTap, FlowWindow
from megatron_phf.model.gpt import FlowGPTModel, set_flow_tap
from megatron_phf.model.rows import gather_rows
from megatron_phf.teacher import Teacher
from megatron_phf.train.metrics import PhaseTimer, StepMetrics, summarize
from megatron_phf.train.nonfinite import NonfiniteSteps
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.pipeline import evaluating, run_pipeline


@dataclass(frozen=True)
class OutputLoss:
    """What the last stage knows of one microbatch's output loss; each [n], in nats."""

    per_token: Tensor
    clipped: Tensor
    teacher_entropy: Tensor
    sequence: Tensor  # row of each token in its microbatch


class Distiller:
    """Student, teacher and optimizer, and the step that trains one on the other."""

    def __init__(
        self,
        config: Config,
        arch: Architecture,
        student: list[FlowGPTModel],
        teacher: Teacher,
        optimizer: StudentOptimizer,
    ) -> None:
        self.config, self.arch = config, arch
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.nonfinite = NonfiniteSteps(config)
        method = config.method
        self._spec = DivergenceSpec(
            beta=method.opsd_beta,
            temperature=method.opsd_temperature,
            clip_mode=method.opsd_clip_mode,
            clip=method.opsd_clip,
            top_k=method.opsd_top_k,
        )
        self.tap = FlowTap(arch.num_layers, student[0].config.sequence_parallel)
        flow = self.tap if method.phf_alpha > 0 else None
        set_flow_tap(student, flow)
        set_flow_tap(teacher.chunks, flow)

    def step(self, iteration: int, rollouts: Sequence[Rollout], timer: PhaseTimer) -> StepMetrics:
        """Train on this data-parallel rank's ``rollouts``.

        A step whose loss or gradient is not finite changes nothing; its metrics say so.

        Raises:
            ValueError: too many of those in a row; the samples were written to a file.
        """
        batch = self._local_batch(rollouts)
        with timer.phase("teacher"):
            targets = self._teacher_targets(batch)
        with timer.phase("student"):
            outputs = self._forward_backward(batch, targets)
        finite = self.optimizer.gradients_finite()
        skip = self.nonfinite.must_skip(iteration, rollouts, outputs, self.tap.values, finite)
        learning_rate, grad_norm = self.optimizer.learning_rate, math.nan
        with timer.phase("optimizer"):
            if not skip:
                learning_rate, grad_norm = self.optimizer.step()
                self.teacher.update(self.student)
        return summarize(
            outputs, self.tap.values, self.arch.num_layers, self.config, learning_rate, grad_norm
        )

    def _local_batch(self, rollouts: Sequence[Rollout]) -> LocalBatch:
        method, where = self.config.method, device.device()
        sequence_parallel = self.student[0].config.sequence_parallel
        batch = make_local_batch(
            rollouts,
            self.config.train.micro_batch_size,
            flow_window(method.phf_window_size, method.phf_window_rule),
            length_multiple=parallel.tensor_parallel_size() if sequence_parallel else 1,
        )
        moved = [type(m)(m.student.to(where), m.teacher.to(where)) for m in batch.microbatches]
        return LocalBatch(moved, batch.num_tokens, batch.num_sequences)

    def _rows(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        """Final hidden states [s, b, h] -> those that predict a response token, [n, h]."""
        sharded = self.student[0].config.sequence_parallel
        group = parallel.tensor_parallel_group() if sharded else None
        return gather_rows(hidden, batch.predicting, group)[batch.scored]

    def _windows(self, batches: Sequence[SequenceBatch], scale: float) -> list[FlowWindow]:
        return [FlowWindow(b.window, b.window_valid, scale) for b in batches]

    def _teacher_targets(self, batch: LocalBatch) -> dict[int, Tensor]:
        """The teacher's forward-only pass: flow targets into the tap on every stage, and, on the

        last, final hidden states [n, h] of each microbatch.  Never its logits.
        """
        batches = [m.teacher for m in batch.microbatches]
        rows: dict[int, Tensor] = {}

        def keep(index: int, hidden: Tensor) -> tuple[Tensor, None]:
            rows[index] = self._rows(hidden, batches[index])
            return hidden.new_zeros(()), None

        self.tap.start_recording(self._windows(batches, scale=0.0))
        with self.teacher.active(), evaluating(self.teacher.chunks):
            run_pipeline(self.teacher.chunks, batches, keep, forward_only=True)
        return rows

    def _forward_backward(self, batch: LocalBatch, targets: dict[int, Tensor]) -> list[OutputLoss]:
        totals = torch.tensor([batch.num_tokens, batch.num_sequences], device=device.device())
        num_tokens, num_sequences = parallel.sum_over_data_parallel(totals).tolist()
        if num_tokens == 0:
            raise ValueError("all responses of a global batch are empty: nothing to train on")
        batches = [m.student for m in batch.microbatches]
        # Gradients are averaged over data-parallel ranks, and the schedule divides the output
        # loss (not the layers' attached ones) by the number of microbatches: undo both.
        replicas = parallel.data_parallel_size()
        token_weight = replicas * len(batches) / num_tokens
        flow_scale = self.config.method.phf_alpha * replicas / num_sequences

        def loss(index: int, hidden: Tensor) -> tuple[Tensor, OutputLoss]:
            rows = self._rows(hidden, batches[index])
            return self._output_loss(batches[index], rows, targets.pop(index), token_weight)

        self.optimizer.zero_grad()
        self.tap.start_comparing(self._windows(batches, flow_scale))
        outputs = run_pipeline(self.optimizer.wrapped, batches, loss, forward_only=False)
        self.tap.stop()
        return outputs

    def _output_loss(
        self, batch: SequenceBatch, rows: Tensor, target: Tensor, token_weight: float
    ) -> tuple[Tensor, OutputLoss]:
        student, teacher = self.student[-1], self.teacher.chunks[-1]
        weight = student.output_weight()
        result = chunked_divergence(
            rows,
            target,
            weight,
            teacher.output_weight().detach(),
            torch.full((rows.shape[0],), token_weight, device=rows.device),
            self._spec,
            group=parallel.tensor_parallel_group() if parallel.tensor_parallel_size() > 1 else None,
            vocab_start=parallel.tensor_parallel_rank() * weight.shape[0],
            vocab_size=self.arch.vocab_size,
            chunk_tokens=self.config.method.logits_chunk_tokens,
            target_ids=batch.target_ids(),
            objective=self.config.method.opsd_objective,
        )
        sequence = batch.scored.nonzero()[:, 0]
        report = OutputLoss(result.per_token, result.clipped, result.teacher_entropy, sequence)
        return result.loss, report
