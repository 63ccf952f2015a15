"""One training step: rollouts -> teacher targets -> student -> optimizer -> teacher update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_phf import device, parallel
from megatron_phf.config import Config, flow_spec
from megatron_phf.data.batch import LocalBatch, SequenceBatch, flow_window, make_local_batch
from megatron_phf.data.microbatches import (
    groups_under_budget,
    packed_tokens,
    padded_tokens,
    round_up,
    split_into,
)
from megatron_phf.data.replay_file import Rollout
from megatron_phf.losses import DivergenceSpec, chunked_divergence, chunked_log_probs
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.flow_tap import FlowWindow
from megatron_phf.model.gpt import (
    FlowGPTModel,
    evaluating,
    make_flow_tap,
    sequence_shards,
    set_flow_tap,
    set_padding,
)
from megatron_phf.model.moe import mean_aux_loss, reset_aux_loss
from megatron_phf.model.rows import gather_rows, part_rows
from megatron_phf.model.teacher_architecture import common_vocab_size, layer_map
from megatron_phf.model.userbuffers import fixed_row_length
from megatron_phf.teacher import Teacher
from megatron_phf.train.drift import DriftMeter
from megatron_phf.train.metrics import OutputLoss, PhaseTimer, StepMetrics, summarize
from megatron_phf.train.nonfinite import NonfiniteSteps
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.pipeline import run_pipeline


@dataclass(frozen=True)
class TeacherOutput:
    """What the output loss needs of the teacher on the last stage, elsewhere empty.

    ``rows``: final hidden states [n, h] of each microbatch; ``head``: its output weight, which an
    offloaded teacher leaves on the device until the student's pass is over.
    """

    rows: dict[int, Tensor]
    head: Tensor | None


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
        self.drift = DriftMeter(config) if config.rollout.rollout_engine == "vllm" else None
        self._useful_fraction, self._microbatches = 1.0, 1
        self.shards = sequence_shards(student[0].config)
        self._vocab_size = common_vocab_size(arch, config)
        layers = layer_map(config, arch.num_layers, teacher.chunks[0].config.num_layers)
        spec = flow_spec(config)
        self.tap = make_flow_tap(student, teacher.chunks, layers, method.phf_window_size, spec)
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
        if self.config.lora.lora_dropout > 0:
            parallel.seed_dropout(self.config.train.seed, iteration)
        with timer.phase("student"):
            outputs = self._forward_backward(batch, targets)
        del targets  # with it goes the output head of an offloaded teacher
        finite = self.optimizer.gradients_finite()
        skip = self.nonfinite.must_skip(
            iteration, rollouts, outputs, self.tap.values, finite, batch.order
        )
        learning_rate, grad_norm = self.optimizer.learning_rate, math.nan
        with timer.phase("optimizer"):
            if not skip:
                learning_rate, grad_norm = self.optimizer.step()
                self.teacher.update(self.student)
        return self.metrics(outputs, learning_rate, grad_norm)

    def metrics(
        self, outputs: list[OutputLoss], learning_rate: float, grad_norm: float
    ) -> StepMetrics:
        """The step's numbers, reduced over the world; every rank calls it."""
        metrics = summarize(
            outputs,
            self.arch.num_layers,
            self.config,
            learning_rate,
            grad_norm,
            self.tap,
        )
        balance = mean_aux_loss(self.arch, self.config, self._microbatches)
        extra = {"useful_tokens_fraction": self._useful_fraction}
        extra |= {} if balance is None else {"moe_aux_loss": balance}
        if self.drift is not None:
            extra |= self.drift.take()
        return dataclasses.replace(metrics, extra=extra)

    def _local_batch(self, rollouts: Sequence[Rollout]) -> LocalBatch:
        method, where = self.config.method, device.device()
        batch = make_local_batch(
            rollouts,
            self.config.train.micro_batch_size,
            flow_window(method.phf_window_size, method.phf_window_rule),
            length_multiple=self._row_multiple(),
            sequence_multiple=self.shards.chunks,
            groups=self._groups(rollouts),
            packed=self.config.batching.pack_sequences,
            row_length=fixed_row_length(self.config, self.shards.length_multiple),
        )
        moved = [type(m)(m.student.to(where), m.teacher.to(where)) for m in batch.microbatches]
        return dataclasses.replace(batch, microbatches=moved)

    def _row_multiple(self) -> int:
        """Packed rows differ in their sequences anyway: they have no padding but what they need."""
        packed = self.config.batching.pack_sequences
        return self.shards.multiple_with(1 if packed else device.row_multiple())

    def _groups(self, rollouts: Sequence[Rollout]) -> list[list[int]] | None:
        """The microbatches under --max-tokens-per-microbatch, as many on every data-parallel rank:

        experts wait for tokens of all of them.
        """
        budget = self.config.batching.max_tokens_per_microbatch
        if budget == 0:
            return None
        multiple, tokens = self._row_multiple(), padded_tokens
        if self.config.batching.pack_sequences:  # all else that is padded is the row
            multiple, tokens = self.shards.chunks, packed_tokens

        def padded(prompt: Sequence[int], response: Sequence[int]) -> int:
            return round_up(len(prompt) + len(response), multiple)

        lengths = [
            (
                padded(r.student_prompt_ids, r.response_ids),
                padded(r.teacher_prompt_ids, r.response_ids),
            )
            for r in rollouts
        ]
        groups = groups_under_budget(lengths, budget, tokens)
        number = max(parallel.gather_over_data_parallel(len(groups)))
        return split_into(groups, number, lengths, tokens)

    def _windows(self, batches: Sequence[SequenceBatch], scale: float) -> list[FlowWindow]:
        return [FlowWindow(b.window, b.window_valid, scale, b.cu_seqlens) for b in batches]

    def _teacher_targets(self, batch: LocalBatch) -> TeacherOutput:
        """The teacher's forward-only pass: flow targets into the tap on every stage, and, on the

        last, final hidden states.  Never its logits.
        """
        batches = [m.teacher for m in batch.microbatches]
        rows: dict[int, Tensor] = {}

        def keep(index: int, hidden: Tensor) -> tuple[Tensor, None]:
            batch = batches[index]
            # All of them on every context rank: the student's row may be elsewhere.
            every = gather_rows(hidden, batch.predicting, self.shards, batch.cu_seqlens)
            rows[index] = every[batch.scored]
            return hidden.new_zeros(()), None

        self.tap.start_recording(self._windows(batches, scale=0.0))
        with self.teacher.active(), evaluating(self.teacher.chunks):
            run_pipeline(self.teacher.chunks, batches, keep, self.shards, forward_only=True)
            last = self.teacher.chunks[-1]
            head = last.output_weight().detach() if last.post_process else None
        if self.config.method.phf_alpha > 0:
            self.tap.finish_recording()
        return TeacherOutput(rows, head)

    def _forward_backward(self, batch: LocalBatch, teacher: TeacherOutput) -> list[OutputLoss]:
        counts = [batch.num_tokens, batch.num_sequences, *batch.token_counts()]
        totals = parallel.sum_over_data_parallel(torch.tensor(counts, device=device.device()))
        num_tokens, num_sequences, useful, computed = totals.tolist()
        self._useful_fraction = useful / computed
        self._microbatches = len(batch.microbatches)
        if num_tokens == 0:
            raise ValueError("all responses of a global batch are empty: nothing to train on")
        batches = [m.student for m in batch.microbatches]
        # Gradients are averaged over data-parallel ranks, and the schedule divides the output
        # loss (not the layers' attached ones) by the number of microbatches: undo both.  They are
        # averaged over context-parallel ranks too, for which the schedule makes up alike.
        replicas = parallel.data_parallel_size()
        token_weight = replicas * len(batches) / num_tokens
        averaged = replicas * parallel.context_parallel_size()
        flow_scale = self.config.method.phf_alpha * averaged / num_sequences

        def loss(index: int, hidden: Tensor) -> tuple[Tensor, OutputLoss]:
            assert teacher.head is not None, "the last stage computes the loss"
            target = teacher.rows.pop(index), teacher.head
            return self._output_loss(batches[index], hidden, target, token_weight)

        self.optimizer.zero_grad()
        self.tap.start_comparing(self._windows(batches, flow_scale))
        self._mask_padding(batches)
        outputs = run_pipeline(
            self.optimizer.wrapped, batches, loss, self.shards, forward_only=False
        )
        set_padding(self.student, None)
        self.tap.stop()
        return outputs

    def _mask_padding(self, batches: Sequence[SequenceBatch]) -> None:
        """Padding must not count in the routers' load-balancing loss.

        The schedule gives that loss its share of the mean over microbatches.
        """
        if self.arch.experts is not None:
            pieces = [self.shards.piece(b.padding, b.cu_seqlens) for b in batches]
            set_padding(self.student, pieces)
            reset_aux_loss()

    def _output_loss(
        self,
        batch: SequenceBatch,
        hidden: Tensor,
        teacher: tuple[Tensor, Tensor],
        token_weight: float,
    ) -> tuple[Tensor, OutputLoss]:
        """Final hidden states [s_local, b, h] -> the loss of the tokens that this context rank

        predicts.  ``teacher``: its rows [n, h], of all n tokens, and its output weight.
        """
        rows, mine = part_rows(hidden, batch.predicting, self.shards, batch.cu_seqlens)
        here, kept = batch.scored & mine, mine[batch.scored]
        rows, weight = rows[here], self.student[-1].output_weight()
        targets, head = batch.target_ids()[kept], self._head_split(weight)
        if self.drift is not None and batch.log_probs is not None:
            self.drift.add(chunked_log_probs(rows, weight, targets, **head), batch.log_probs[here])
        result = chunked_divergence(
            rows,
            teacher[0][kept],
            weight,
            teacher[1],
            torch.full((rows.shape[0],), token_weight, device=rows.device),
            self._spec,
            target_ids=targets,
            objective=self.config.method.opsd_objective,
            **head,
        )
        sequence = here.nonzero()[:, 0]
        report = OutputLoss(result.per_token, result.clipped, result.teacher_entropy, sequence)
        return result.loss, report

    def _head_split(self, weight: Tensor) -> dict[str, Any]:
        """Which rows of the output head this rank has, and how many tokens a chunk has."""
        group = parallel.tensor_parallel_group()
        return {
            "group": group if parallel.tensor_parallel_size() > 1 else None,
            "vocab_start": parallel.tensor_parallel_rank() * weight.shape[0],
            "vocab_size": self._vocab_size,
            "chunk_tokens": self.config.method.logits_chunk_tokens,
        }
