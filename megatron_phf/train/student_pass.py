"""The student reads its rollouts: forward and backward, with both losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_names
from megatron_phf.hidden.rows import SequenceShards, part_rows
from megatron_phf.hidden.tap import FlowTap
from megatron_phf.losses import DivergenceSpec, chunked_divergence
from megatron_phf.model.gpt import FlowGPTModel, set_padding
from megatron_phf.model.moe import mean_aux_loss, reset_aux_loss
from megatron_phf.runtime import device, parallel
from megatron_phf.teacher.architecture import Models
from megatron_phf.train.batch import PlacedBatch, StepBatch, flow_windows
from megatron_phf.train.by_teacher import metrics_by_teacher
from megatron_phf.train.drift import DriftMeter
from megatron_phf.train.importance import ImportanceWeights
from megatron_phf.train.measure import SampledLogProbs
from megatron_phf.train.metrics import OutputLoss
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.pipeline import run_pipeline
from megatron_phf.train.teacher_pass import TeacherOutput
from megatron_phf.train.token_weights import OutputHead, TokenWeigher, TokenWeights


@dataclass(frozen=True)
class StudentOutput:
    """``outputs``: of each microbatch, on the last stage; ``extra``: metrics, already reduced.

    ``num_tokens``, ``num_sequences``: what the global batch trains on.
    """

    outputs: list[OutputLoss]
    num_tokens: int
    num_sequences: int
    extra: dict[str, Any] = field(default_factory=dict)


class StudentPass:
    """Forward and backward through megatron's schedules; leaves gradients in DDP's buffers."""

    def __init__(
        self,
        config: Config,
        models: Models,
        student: list[FlowGPTModel],
        optimizer: StudentOptimizer,
        tap: FlowTap | None,
        shards: SequenceShards,
    ) -> None:
        """``tap`` None: there is no flow loss."""
        self._config, self._arch, self._student = config, models.student, student
        self._optimizer, self._tap, self._shards = optimizer, tap, shards
        method = config.method
        self._spec = DivergenceSpec(
            beta=method.opsd_beta,
            temperature=method.opsd_temperature,
            clip_mode=method.opsd_clip_mode,
            clip=method.opsd_clip,
            top_k=method.opsd_top_k,
        )
        self._drift = DriftMeter(config)
        self._importance = ImportanceWeights(method.importance_ratio_cap)
        self._head = OutputHead(models.vocab_size, method.logits_chunk_tokens)
        self._weigh = TokenWeigher(config, student, self._spec, self._head, shards)
        self._sampled = SampledLogProbs(config, student, self._head, shards)

    def __call__(self, batch: StepBatch, teacher: TeacherOutput) -> StudentOutput:
        """Both losses' gradients over the microbatches; every rank calls it.

        Raises:
            ValueError: the global batch has no token to train on, or (--importance-ratio-cap) a
                rollout does not say how it was sampled.
        """
        batches = batch.students
        pairs = zip(batch.order, batches, strict=True)
        rows = [(len(order), each.log_probs is not None) for order, each in pairs]
        known = [sum(n for n, _ in rows), sum(n for n, measured in rows if measured)]
        counts = [batch.num_tokens, batch.num_sequences, *batch.token_counts, *known]
        totals = parallel.sum_over_data_parallel(device.from_host(torch.tensor(counts)))
        num_tokens, num_sequences, useful, computed, read, measured = totals.tolist()
        self._importance.check(measured, read)
        # Of a batch of which some are not kept, here or in what is replayed, there may be nothing.
        if num_tokens == 0 and num_sequences == read:
            raise ValueError(
                "all responses of a global batch are empty, or nothing in them is the student's "
                "or behind --skip-first-tokens: nothing to train on"
            )
        # Gradients are averaged over data-parallel ranks, and the schedule divides the output
        # loss (not the layers' attached ones) by the number of microbatches: undo both.  They are
        # averaged over context-parallel ranks too, for which the schedule makes up alike.
        replicas = parallel.data_parallel_size()
        opsd_weight = self._config.method.opsd_weight
        token_weight = opsd_weight * replicas * len(batches) / max(num_tokens, 1)
        averaged = replicas * parallel.context_parallel_size()
        flow_scale = self._config.method.phf_alpha * averaged / max(num_sequences, 1)
        weights = self._weigh(batches, teacher)
        if measured > 0:
            self._sampled.read_apart(batches)
        outputs = self._run(batches, teacher, token_weight, flow_scale, weights)
        extra: dict[str, Any] = {"useful_tokens_fraction": useful / computed}
        extra |= metrics_by_teacher(outputs, batch.teacher_names, teacher_names(self._config))
        balance = mean_aux_loss(self._arch, self._config, len(batches))
        extra |= {} if balance is None else {"moe_aux_loss": balance}
        extra |= self._drift.take() if measured > 0 else {}
        extra |= self._importance.take()
        return StudentOutput(outputs, num_tokens, num_sequences, extra)

    def _run(
        self,
        batches: Sequence[PlacedBatch],
        teacher: TeacherOutput,
        token_weight: float,
        flow_scale: float,
        weights: list[TokenWeights] | None,
    ) -> list[OutputLoss]:
        def loss(index: int, hidden: Tensor) -> tuple[Tensor, OutputLoss]:
            target = None
            if index in teacher.rows:
                target = teacher.rows.pop(index), teacher.heads.pop(index)
            weight = None if weights is None else weights[index].own
            return self._output_loss(index, batches[index], hidden, target, token_weight, weight)

        self._optimizer.zero_grad()
        if self._tap is not None:
            windows = None if weights is None else [w.window for w in weights]
            self._tap.start_comparing(flow_windows(batches, flow_scale, windows))
        self._mask_padding(batches)
        outputs = run_pipeline(
            self._optimizer.wrapped, batches, loss, self._shards, forward_only=False
        )
        set_padding(self._student, None)
        if self._tap is not None:
            self._tap.stop()
        return outputs

    def _mask_padding(self, batches: Sequence[PlacedBatch]) -> None:
        """Padding must not count in the routers' load-balancing loss.

        The schedule gives that loss its share of the mean over microbatches.
        """
        if self._arch.experts is not None:
            set_padding(self._student, [b.padding for b in batches])
            reset_aux_loss()

    def _output_loss(
        self,
        index: int,
        batch: PlacedBatch,
        hidden: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        token_weight: float,
        weights: Tensor | None,
    ) -> tuple[Tensor, OutputLoss]:
        """Final hidden states [s_local, b, h] -> the loss of this context rank's tokens.

        Those that it predicts.  ``teacher``: its rows [n, h], of all n tokens, and its output
        weight, None where the loss does not look at it; ``weights`` [n]: what each token counts,
        None where all the same.
        """
        rows = part_rows(hidden, batch.own, self._shards)
        weight = self._student[-1].output_weight()
        head = self._head.split(weight)
        counts = torch.full((rows.shape[0],), token_weight, device=rows.device)
        importance = None
        log_probs = self._sampled.of(index, rows, batch)
        if log_probs is not None:
            self._drift.add(log_probs, batch.log_probs)
            importance = self._importance.of(log_probs, batch.log_probs)
        if importance is not None:
            weights = importance if weights is None else weights * importance
        if teacher is None:
            read, other = rows, weight
        else:
            kept = batch.kept
            read = teacher[0] if kept is None else teacher[0].index_select(0, kept)
            other = teacher[1]
        result = chunked_divergence(
            rows,
            read,
            weight,
            other,
            counts if weights is None else counts * weights,
            self._spec,
            target_ids=batch.targets,
            objective=self._config.method.opsd_objective,
            **head,
        )
        report = OutputLoss(*result[1:], batch.sequence)
        if weights is not None:
            report = replace(report, per_token=report.per_token * weights)
        if teacher is None:  # what was compared with is the student itself
            unknown = torch.full_like(report.agreement, torch.nan)
            report = replace(report, teacher_entropy=unknown, agreement=unknown)
        return result.loss, report
