"""The adapter of one linear: two small matrices, in any parallel layout, and its dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from megatron_phf.config.settings import Config
from megatron_phf.runtime import device, parallel


class _DroppedLinear(torch.autograd.Function):
    """x [..., in] -> F.linear(F.dropout(x, p), weight); keeps x and a mask.

    autograd would keep what is left of x instead, which is a tensor of its own for each target; x
    itself all targets of one input share.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True)
        ctx.save_for_backward(x, weight, mask)
        ctx.scale = 1.0 / (1.0 - p)
        return F.linear(dropped, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, mask = ctx.saved_tensors
        rows = torch.ops.aten.native_dropout_backward(x, mask, ctx.scale).flatten(0, -2)
        d_weight = grads[0].flatten(0, -2).T @ rows
        d_x = torch.ops.aten.native_dropout_backward(grads[0] @ weight, mask, ctx.scale)
        return d_x, d_weight, None


class LowRankAdapter(torch.nn.Module):
    """x -> alpha / r * lora_B(lora_A(dropout(x))) of one target, this rank's part.

    Args:
        shape: (out, in) of the HuggingFace linear.
        padded: the same with the channels of zero heads.
        column: whether tensor-parallel ranks share out the output (else the input).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        padded: tuple[int, int],
        column: bool,
        config: Config,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        tp, rank = parallel.tensor_parallel_size(), config.lora.lora_rank
        self.shape, self.column = shape, column
        self.scale = config.lora.lora_alpha / rank
        self.dropout = config.lora.lora_dropout
        rows, columns = (padded[0] // tp, padded[1]) if column else (padded[0], padded[1] // tp)
        options: dict[str, Any] = {"dtype": dtype, "device": device.device()}
        self.lora_A = Parameter(torch.zeros(rank, columns, **options))
        self.lora_B = Parameter(torch.zeros(rows, rank, **options))
        shared, dim = self._sharded()
        whole = self.lora_A if column else self.lora_B
        tensor_parallel.set_tensor_model_parallel_attributes(shared, True, dim, 1)
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(whole)
        # Each rank sees its part of the sequence: megatron then sums this gradient over them.
        whole.sequence_parallel = config.parallel.sequence_parallel and tp > 1

    def _sharded(self) -> tuple[Parameter, int]:
        """The parameter that tensor-parallel ranks share out, and along which dimension."""
        return (self.lora_B, 0) if self.column else (self.lora_A, 1)

    def forward(self, x: Tensor, sequence_parallel: bool) -> Tensor:
        """x [s, b, in] -> [s, b, out]: this rank's part, sharded as the linear's own ends are."""
        low = self._low(x, sequence_parallel)
        if self.column and sequence_parallel:
            low = tensor_parallel.gather_from_sequence_parallel_region(low)
        elif self.column:
            low = tensor_parallel.copy_to_tensor_model_parallel_region(low)
        elif sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        return F.linear(low, self.lora_B).mul_(self.scale)  # nobody else has it

    def add_(self, x: Tensor, output: Tensor) -> None:
        """The same, added to ``output`` [s, b, groups, channels].

        Without autograd and dropout, on whole sequences.
        """
        low = F.linear(x, self.lora_A)
        if not self.column and parallel.tensor_parallel_size() > 1:
            dist.all_reduce(low, group=parallel.tensor_parallel_group())
        output += F.linear(low, self.lora_B).mul_(self.scale).view_as(output)

    def _low(self, x: Tensor, sequence_parallel: bool) -> Tensor:
        """lora_A(dropout(x)) of what is here of x.

        Equal inputs get equal masks on all tensor-parallel ranks, parts get different ones.
        megatron's recompute restores both generators.
        """
        if not self.training or self.dropout == 0:
            return F.linear(x, self.lora_A)
        if self.column and not sequence_parallel:
            return _DroppedLinear.apply(x, self.lora_A, self.dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return _DroppedLinear.apply(x, self.lora_A, self.dropout)

    @torch.no_grad()
    def initialize(self, *seed: object) -> None:
        """PEFT's start: lora_A uniform within 1 / sqrt(in), lora_B zero; the same in any layout."""
        generator = torch.Generator().manual_seed(parallel.derived_seed(*seed))
        bound = 1 / math.sqrt(self.shape[1])
        whole = torch.empty(self.lora_A.shape[0], self.shape[1]).uniform_(
            -bound, bound, generator=generator
        )
        self.load(whole, torch.zeros(self.shape[0], self.lora_B.shape[1]))

    @torch.no_grad()
    def load(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Take this rank's part of whole matrices [r, in] and [out, r].

        The channels of zero heads get zeros, and keep them: nothing reads such a head, and its
        output is zero, so that either factor of each gradient there is.
        """
        for parameter, whole in ((self.lora_A, lora_a), (self.lora_B, lora_b)):
            part = whole.to(parameter.device, parameter.dtype)
            shared, dim = self._sharded()
            if parameter is shared:
                size, start = parameter.shape[dim], parallel.tensor_parallel_rank()
                end = size * parallel.tensor_parallel_size()
                padding = [0, 0, 0, end - part.shape[0]] if dim == 0 else [0, end - part.shape[1]]
                part = F.pad(part, padding).narrow(dim, start * size, size)
            parameter.copy_(part)

    @torch.no_grad()
    def whole(self) -> tuple[Tensor, Tensor]:
        """(lora_A [r, in], lora_B [out, r]) without zero heads, on all tensor-parallel ranks."""
        shared, dim = self._sharded()
        gathered = torch.cat(parallel.gather_over_tensor_parallel(shared.data), dim=dim)
        if self.column:
            return self.lora_A.data, gathered[: self.shape[0]].contiguous()
        return gathered[:, : self.shape[1]].contiguous(), self.lora_B.data

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For megatron-core's dist_checkpointing."""
        axes = {"lora_B": 0} if self.column else {"lora_A": 1}
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
