"""Log-probabilities of sampled tokens by the student as it samples: without dropout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.hidden.rows import SequenceShards, part_rows
from megatron_phf.losses import chunked_log_probs
from megatron_phf.model.gpt import FlowGPTModel, evaluating
from megatron_phf.runtime import parallel
from megatron_phf.train.batch import PlacedBatch
from megatron_phf.train.pipeline import run_pipeline
from megatron_phf.train.token_weights import OutputHead


class SampledLogProbs:
    """log p of this context rank's scored tokens, of microbatches that say how they were sampled.

    The training pass gives them where it computes without dropout.  Else the student reads the
    microbatches once more before it: all of them where each token's importance weight is asked for,
    or the first ones alone (a round of the pipeline's virtual stages), which tell of drift.
    """

    def __init__(
        self, config: Config, student: list[FlowGPTModel], head: OutputHead, shards: SequenceShards
    ) -> None:
        self._student, self._head, self._shards = student, head, shards
        self._dropout = config.lora.lora_dropout > 0
        virtual = config.parallel.num_virtual_stages_per_pipeline_rank > 1
        first = parallel.pipeline_size() if virtual else 1
        self._count = first if config.method.importance_ratio_cap is None else None
        self._read: dict[int, Tensor] = {}

    def read_apart(self, batches: Sequence[PlacedBatch]) -> None:
        """Read without dropout what the training pass would read with it; every rank calls it."""
        self._read = {}
        if not self._dropout:
            return

        def keep(index: int, hidden: Tensor) -> tuple[Tensor, None]:
            batch = batches[index]
            if batch.log_probs is not None:
                rows = part_rows(hidden, batch.own, self._shards)
                self._read[index] = self._log_probs(rows, batch)
            return hidden.new_zeros(()), None

        with evaluating(self._student):
            chosen = batches[: self._count]
            run_pipeline(self._student, chosen, keep, self._shards, forward_only=True)

    def of(self, index: int, rows: Tensor, batch: PlacedBatch) -> Tensor | None:
        """[n], on the last stage; None where they are not known.

        rows [n, h]: the training pass's final hidden states of microbatch ``index``.
        """
        if batch.log_probs is None or self._dropout:
            return self._read.pop(index, None)
        return self._log_probs(rows, batch)

    def _log_probs(self, rows: Tensor, batch: PlacedBatch) -> Tensor:
        weight = self._student[-1].output_weight()
        return chunked_log_probs(rows, weight, batch.targets, **self._head.split(weight))
