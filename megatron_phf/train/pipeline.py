"""Run microbatches through the pipeline with megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_phf.hidden.rows import SequenceShards
from megatron_phf.runtime import device
from megatron_phf.runtime.private_names import ShapesOfMessages
from megatron_phf.train.batch import PlacedBatch

# (microbatch number, final hidden states [s, b, h]) -> (loss [], what to report)
LossFunction = Callable[[int, Tensor], tuple[Tensor, Any]]
# (model chunk, microbatch number): what comes before that chunk reads it.
Preparation = Callable[[Any, int], None]


def packed_seq_params(
    batch: PlacedBatch, shards: SequenceShards, on_host: bool
) -> PackedSeqParams | None:
    """Where the sequences of a packed row end, for attention and rotary positions.

    ``on_host``: for layers that cut rows there, one sequence after the other: from the device they
    would have to fetch the lengths in every layer.

    Each with its padding, which causality hides from its tokens.  Transformer Engine's context
    parallelism would cut real lengths wrongly that 2 CP does not divide, and its flash attention
    takes no padding between sequences: one tensor is both ends, which says that there is none
    (NVIDIA/TransformerEngine#1930, #3331, #3487; Megatron-LM's pretrain_gpt.py does the same).
    """
    limits, longest = batch.cu_seqlens, batch.max_seqlen
    if limits is None:
        return None
    if not on_host:
        limits = device.from_host(limits)
    params = PackedSeqParams("thd", limits, limits, max_seqlen_q=longest, max_seqlen_kv=longest)
    if shards.context is not None:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = limits
    return params


class KnownShapes(ShapesOfMessages, P2PCommunicator):
    """Messages between stages that all have the whole batch: none is announced by its shape.

    megatron-core would send it ahead, and wait for the device at both ends, for every message.
    """

    def expect(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Shapes [s, b, h] of the microbatches, which come in this order from either side."""
        self._arriving = iter(shapes), iter(shapes)

    def shapes_of_next(self, *asked: bool) -> tuple[Sequence[int], ...]:
        """Of the next message from the stage before, and from the one behind."""
        return tuple(
            next(shapes) if wanted else (0, 0, 0)
            for shapes, wanted in zip(self._arriving, asked, strict=True)
        )


def _messages(
    config: Any, batches: Sequence[PlacedBatch], shards: SequenceShards
) -> dict[str, Any]:
    """How the schedule sends: as it does by itself, unless microbatches have other lengths.

    Those exclude virtual stages, so that each stage has one chunk and sees them in order.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups(
        ["tp", "pp", "cp", "embd", "pos_embd", "dp_cp"]
    )
    if not config.variable_seq_lengths or groups.pp.size() == 1:
        return {}
    parts = shards.context_size * shards.sequence_size
    messages = KnownShapes(groups.pp, config)
    messages.expect([(b.shape[1] // parts, b.shape[0], config.hidden_size) for b in batches])
    return {"p2p_communicator": messages, "pg_collection": groups}


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PlacedBatch],
    loss: LossFunction,
    shards: SequenceShards,
    *,
    forward_only: bool,
    prepare: Preparation | None = None,
) -> list[Any]:
    """Forward (and backward) of every microbatch; what ``loss`` reported, on the last stage.

    The losses of the microbatches are added up as they are.  (megatron-core divides each by the
    number of microbatches, and DDP averages gradients over data-parallel ranks: the caller's
    normaliser takes both into account, see ``train.step.normalizer``.)
    """
    config: Any = chunks[0].config
    local = config.transformer_impl == "local"
    iterators = [iter(enumerate(batches)) for _ in chunks]

    def forward_step(
        iterator: Iterator[tuple[int, PlacedBatch]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
        index, batch = next(iterator)
        if prepare is not None:
            prepare(model, index)
        # The microbatch's number rides along to the layers (see FlowTransformerLayer).
        extra = {"context_mask": torch.tensor(index)}
        hidden = model(
            batch.tokens,
            None,
            None,
            packed_seq_params=packed_seq_params(batch, shards, on_host=local),
            extra_block_kwargs=extra,
        )
        return hidden, lambda output: loss(index, output)

    b, s = batches[0].shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=s,
        micro_batch_size=b,
        forward_only=forward_only,
        **_messages(config, batches, shards),
    )
