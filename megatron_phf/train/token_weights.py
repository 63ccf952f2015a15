"""What each token of a step counts (``--token-weighting``), known to all ranks before training.

A hidden layer's loss needs its tokens' weights before the last stage has seen their logits.  What a
weighting asks of the student is therefore read in a forward pass of its own (one more of the
student's; its weights are those of the training pass, without dropout), what it asks of the teacher
from the states that its pass left.  Logits exist for one chunk of tokens at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.data.batch import SequenceBatch
from megatron_phf.hidden.rows import SequenceShards, part_rows
from megatron_phf.losses import (
    TOKEN_WEIGHTINGS,
    DivergenceSpec,
    WeightingOptions,
    chunked_divergence,
    chunked_entropy,
    token_weights,
)
from megatron_phf.model.gpt import FlowGPTModel, evaluating
from megatron_phf.runtime import device, parallel
from megatron_phf.train.pipeline import run_pipeline
from megatron_phf.train.teacher_pass import TeacherOutput


@dataclass(frozen=True)
class OutputHead:
    """How the output head is shared out: real token ids, and tokens of a chunk."""

    vocab_size: int
    chunk_tokens: int

    def split(self, weight: Tensor) -> dict[str, Any]:
        """Which rows of the output head this rank has, and how many tokens a chunk has."""
        group = parallel.tensor_parallel_group()
        return {
            "group": group if parallel.tensor_parallel_size() > 1 else None,
            "vocab_start": parallel.tensor_parallel_rank() * weight.shape[0],
            "vocab_size": self.vocab_size,
            "chunk_tokens": self.chunk_tokens,
        }


class TokenWeigher:
    """Weights of the response tokens of each microbatch, the same on every rank of the model."""

    def __init__(
        self,
        config: Config,
        student: list[FlowGPTModel],
        spec: DivergenceSpec,
        head: OutputHead,
        shards: SequenceShards,
    ) -> None:
        """``spec``: of the output loss; its clip plays no part in what a token counts."""
        method = config.method
        self._name, self._student, self._head = method.token_weighting, student, head
        self._spec = dataclasses.replace(spec, clip_mode="none")
        self._shards = shards
        self._options = WeightingOptions(method.token_keep_fraction, method.token_entropy_threshold)

    def __call__(
        self, batches: Sequence[SequenceBatch], teacher: TeacherOutput
    ) -> list[Tensor] | None:
        """Weights [b, r] of each microbatch; None: all tokens count the same.

        Every rank calls it.  The teacher's rows stay as they are.
        """
        if self._name == "none":
            return None
        statistic = TOKEN_WEIGHTINGS[self._name].statistic
        values: list[Tensor] | list[None] = [None] * len(batches)
        if statistic is not None:
            if statistic == "teacher_entropy":
                found = self._of_teacher(batches, teacher)
            else:
                found = self._of_student(batches, teacher, statistic)
            values = self._shared(batches, found)
        return [
            token_weights(self._name, batch.scored, each, self._options)
            for batch, each in zip(batches, values, strict=True)
        ]

    def _of_teacher(
        self, batches: Sequence[SequenceBatch], teacher: TeacherOutput
    ) -> dict[int, Tensor]:
        """Entropies on the last stage; each context rank computes its share of the tokens."""
        found: dict[int, Tensor] = {}
        for index, rows in teacher.rows.items():
            assert teacher.head is not None
            found[index] = rows.new_zeros(batches[index].scored.shape, dtype=torch.float32)
            share = slice(parallel.context_parallel_rank(), None, parallel.context_parallel_size())
            entropy = rows.new_zeros(len(rows), dtype=torch.float32)
            entropy[share] = chunked_entropy(
                rows[share], teacher.head, self._spec.temperature, **self._head.split(teacher.head)
            )
            found[index][batches[index].scored] = entropy
        return found

    def _of_student(
        self, batches: Sequence[SequenceBatch], teacher: TeacherOutput, statistic: str
    ) -> dict[int, Tensor]:
        """A forward pass of the student: values on the last stage, of a context rank's tokens."""
        found: dict[int, Tensor] = {}

        def keep(index: int, hidden: Tensor) -> tuple[Tensor, None]:
            batch, weight = batches[index], self._student[-1].output_weight()
            rows, mine = part_rows(hidden, batch.predicting, self._shards, batch.cu_seqlens)
            here, kept = batch.scored & mine, mine[batch.scored]
            head = self._head.split(weight)
            found[index] = hidden.new_zeros(here.shape, dtype=torch.float32)
            if statistic == "student_entropy":
                values = chunked_entropy(rows[here], weight, self._spec.temperature, **head)
            else:
                assert teacher.head is not None, "the last stage has it"
                values = chunked_divergence(
                    rows[here],
                    teacher.rows[index][kept],
                    weight,
                    teacher.head,
                    rows.new_ones(len(kept.nonzero()), dtype=torch.float32),
                    self._spec,
                    **head,
                ).per_token
            found[index][here] = values.float()
            return hidden.new_zeros(()), None

        with evaluating(self._student):
            run_pipeline(self._student, batches, keep, self._shards, forward_only=True)
        return found

    def _shared(self, batches: Sequence[SequenceBatch], found: dict[int, Tensor]) -> list[Tensor]:
        """What the last stage found [b, r], on every rank of the model."""
        sizes = [batch.scored.numel() for batch in batches]
        flat = torch.zeros(sum(sizes), device=device.device())
        for index, part in enumerate(flat.split(sizes)):
            if index in found:
                part.copy_(found[index].flatten())
        if len(flat):  # alike on all ranks of the model
            if found and self._shards.context is not None:
                dist.all_reduce(flat, group=self._shards.context)
            parallel.broadcast_from_last_stage(flat)
        return [
            part.view(batch.scored.shape)
            for part, batch in zip(flat.split(sizes), batches, strict=True)
        ]
