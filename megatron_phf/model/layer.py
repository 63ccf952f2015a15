"""Megatron's transformer layer with the flow loss at its output, and the local norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_phf.hidden.tap import FlowTap
from megatron_phf.model.fp8 import outside_fp8


class FlowTransformerLayer(TransformerLayer):
    """A transformer layer that shows both its ends to the :class:`FlowTap` set on it.

    The microbatch's number comes as ``context_mask``, a [] int64 tensor on the CPU.  That argument
    belongs to cross-attention, which decoders lack; it is the one unused tensor that megatron-core
    hands through a block *and* saves with the inputs of a recomputed layer.  An attribute set
    before the forward would name the wrong microbatch when the layer is recomputed later.
    """

    flow_tap: FlowTap | None = None
    # Masks [b, s_local] by microbatch: which tokens the router's load-balancing loss leaves out.
    # megatron-core's own argument for it is not sharded on later pipeline stages.
    padding: Sequence[Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (keyword) -> (output [s, b, h], context)."""
        microbatch = kwargs.pop("context_mask", None)
        if self.padding is not None and microbatch is not None:
            kwargs["padding_mask"] = self.padding[int(microbatch)]
        output, context = super().forward(*args, **kwargs)
        if self.flow_tap is not None and microbatch is not None:
            inputs = kwargs["hidden_states"]
            with outside_fp8(self.config):
                output = self.flow_tap.visit(self.layer_number, int(microbatch), inputs, output)
        return output, context


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm for the ``local`` layer spec, also under sequence parallelism.

    megatron-core's wrapper of it refuses sequence parallelism; all that is needed there is the
    mark by which megatron sums the weight's gradient over tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
