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
from megatron_phf.train.batch import PlacedBatch
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


@dataclass(frozen=True)
class TokenWeights:
    """What each token of a microbatch counts.

    ``own`` [n]: those whose loss this context rank computes; ``window`` [b, m]: the window's.
    """

    own: Tensor
    window: Tensor


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
        self, batches: Sequence[PlacedBatch], teacher: TeacherOutput
    ) -> list[TokenWeights] | None:
        """Of each microbatch; None: all tokens count the same.

        Every rank calls it.  The teacher's rows stay as they are.
        """
        if self._name == "none":
            return None
        statistic = TOKEN_WEIGHTINGS[self._name].statistic
        if statistic is None:
            return [self._weights(batch, None) for batch in batches]
        if statistic == "teacher_entropy":
            found = self._of_teacher(teacher)
        else:
            found = self._of_student(batches, teacher, statistic)
        shared = self._shared(batches, found)
        return [self._weights(b, values) for b, values in zip(batches, shared, strict=True)]

    def _weights(self, batch: PlacedBatch, values: Tensor | None) -> TokenWeights:
        """values [N] of the scored tokens, or None -> what they count."""
        scored = batch.responses
        if scored.shape[1] == 0:  # all responses are empty
            none = torch.zeros(batch.window_tokens.shape, device=device.device())
            return TokenWeights(none[:0, 0], none)
        places = device.from_host(scored.flatten().nonzero()[:, 0])
        spread = None
        if values is not None:
            spread = values.new_zeros(scored.numel()).index_copy(0, places, values)
            spread = spread.view(scored.shape)
        weights = token_weights(self._name, device.from_host(scored), spread, self._options)
        own = weights.flatten().index_select(0, places)
        window = weights.gather(1, device.from_host(batch.window_tokens)) * batch.window_valid
        return TokenWeights(own if batch.kept is None else own.index_select(0, batch.kept), window)

    def _of_teacher(self, teacher: TeacherOutput) -> dict[int, Tensor]:
        """Entropies [N] on the last stage; each context rank computes its share of the tokens."""
        found: dict[int, Tensor] = {}
        share = slice(parallel.context_parallel_rank(), None, parallel.context_parallel_size())
        for index, rows in teacher.rows.items():
            weight = teacher.heads[index]
            found[index] = rows.new_zeros(len(rows), dtype=torch.float32)
            found[index][share] = chunked_entropy(
                rows[share], weight, self._spec.temperature, **self._head.split(weight)
            ).float()
        return found

    def _of_student(
        self, batches: Sequence[PlacedBatch], teacher: TeacherOutput, statistic: str
    ) -> dict[int, Tensor]:
        """A forward pass of the student: [N] on the last stage, 0 but for this context rank's."""
        found: dict[int, Tensor] = {}

        def keep(index: int, hidden: Tensor) -> tuple[Tensor, None]:
            batch, weight = batches[index], self._student[-1].output_weight()
            rows, kept = part_rows(hidden, batch.own, self._shards), batch.kept
            head = self._head.split(weight)
            if statistic == "student_entropy":
                values = chunked_entropy(rows, weight, self._spec.temperature, **head)
            else:
                read = teacher.rows[index]
                values = chunked_divergence(
                    rows,
                    read if kept is None else read.index_select(0, kept),
                    weight,
                    teacher.heads[index],
                    rows.new_ones(len(rows), dtype=torch.float32),
                    self._spec,
                    **head,
                ).per_token
            if kept is not None:
                whole = values.new_zeros(int(batch.responses.sum()))
                values = whole.index_copy(0, kept, values)
            found[index] = values.float()
            return hidden.new_zeros(()), None

        with evaluating(self._student):
            run_pipeline(self._student, batches, keep, self._shards, forward_only=True)
        return found

    def _shared(self, batches: Sequence[PlacedBatch], found: dict[int, Tensor]) -> list[Tensor]:
        """What the last stage found [N], on every rank of the model."""
        sizes = [int(batch.responses.sum()) for batch in batches]
        flat = torch.zeros(sum(sizes), device=device.device())
        parts = flat.split(sizes)
        for index, values in found.items():
            parts[index].copy_(values)
        if len(flat):  # alike on all ranks of the model
            if found and self._shards.context is not None:
                dist.all_reduce(flat, group=self._shards.context)
            parallel.broadcast_from_last_stage(flat)
        return list(parts)
