"""LoRA (arXiv:2106.09685) on Megatron's linear layers, in any parallel layout.

Megatron fuses q/k/v into ``linear_qkv`` and gate/up into ``linear_fc1``; their adapters stay apart,
one for each HuggingFace linear, so that PEFT's files map to them without loss.  A target's
parameters are sub-modules of the linear that computes it:

    decoder.layers.0.self_attention.linear_qkv.adapters.q_proj.lora_A    [r, in]
    decoder.layers.0.self_attention.linear_qkv.adapters.q_proj.lora_B    [out, r]

Column-parallel linears share out lora_B's rows and replicate lora_A; row-parallel ones share out
lora_A's columns and replicate lora_B.  What crosses tensor-parallel ranks has r channels.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megatron_phf.config.settings import Config
from megatron_phf.lora.config import LINEARS, hf_shape, target_modules
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.runtime import device, parallel


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model chunk, by its name, belongs to an adapter."""
    return ".adapters." in name


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
        low = F.linear(self._dropped(x, sequence_parallel), self.lora_A)
        if self.column and sequence_parallel:
            low = tensor_parallel.gather_from_sequence_parallel_region(low)
        elif self.column:
            low = tensor_parallel.copy_to_tensor_model_parallel_region(low)
        elif sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        return F.linear(low, self.lora_B) * self.scale

    def add_(self, x: Tensor, output: Tensor) -> None:
        """The same, added to ``output`` [s, b, groups, channels].

        Without autograd and dropout, on whole sequences.
        """
        low = F.linear(x, self.lora_A)
        if not self.column and parallel.tensor_parallel_size() > 1:
            dist.all_reduce(low, group=parallel.tensor_parallel_group())
        output += F.linear(low, self.lora_B).mul_(self.scale).view_as(output)

    def _dropped(self, x: Tensor, sequence_parallel: bool) -> Tensor:
        """Equal inputs get equal masks on all tensor-parallel ranks, parts get different ones.

        megatron's recompute restores both generators.
        """
        if not self.training or self.dropout == 0:
            return x
        if self.column and not sequence_parallel:
            return F.dropout(x, self.dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

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


class AdaptedLinear:
    """Mixed into the class of a linear layer that carries adapters (see :func:`_attach`)."""

    linear_class: type  # of the linear itself
    adapters: torch.nn.ModuleDict
    adapters_on: bool
    widths: dict[str, int]  # output channels a query group, of all targets it fuses, in order

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the linear's own, plus what the adapters add."""
        output, bias = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if getattr(self, "return_layernorm_output", False):
            output, x = output  # Transformer Engine's fused norm hands out its result
        if self.adapters_on:
            output = output + self._delta(x, output)
        return output, bias

    def add_adapters_(self, x: Tensor, output: Tensor) -> None:
        """What the adapters add, into ``output`` (see ``LowRankAdapter.add_``)."""
        if not self.adapters_on:
            return
        widths = list(self.widths.values())
        parts = output.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        for target, part in zip(self.widths, parts, strict=True):
            if target in self.adapters:
                self.adapters[target].add_(x, part)

    def _delta(self, x: Tensor, output: Tensor) -> Tensor:
        """Query groups alternate q, k and v in the fused output; gate and up are one group."""
        groups = output.shape[-1] // sum(self.widths.values())
        parts = []
        for target, width in self.widths.items():
            shape = (*output.shape[:-1], groups, width)
            if target in self.adapters:
                part = self.adapters[target](x, self.sequence_parallel)  # type: ignore[attr-defined]
                parts.append(part.view(shape))
            else:
                parts.append(output.new_zeros(shape))
        return parts[0].flatten(-2) if len(parts) == 1 else torch.cat(parts, -1).flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The linear's own entries, and the adapters', which are sharded another way."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        state = {key: entry for key, entry in state.items() if not is_adapter(key)}
        for target, adapter in self.adapters.items():
            where = f"{prefix}adapters.{target}."
            state |= adapter.sharded_state_dict(where, sharded_offsets, metadata)
        return state


@functools.cache
def _adapted_class(base: type) -> type:
    return type(f"Adapted{base.__name__}", (AdaptedLinear, base), {"linear_class": base})


def _attach(linear: Any, adapters: dict[str, LowRankAdapter], widths: dict[str, int]) -> None:
    """Let ``linear``, of whatever class the layer spec chose, carry ``adapters``.

    Its class changes, as torch.nn.utils.parametrize changes that of a module: names and parameters
    stay what weight loading and checkpoints expect.
    """
    linear.__class__ = _adapted_class(linear.__class__)
    linear.adapters, linear.adapters_on, linear.widths = (
        torch.nn.ModuleDict(adapters),
        True,
        widths,
    )
    if hasattr(linear, "return_layernorm_output"):
        linear.return_layernorm_output = True
        linear.return_layernorm_output_gathered = False


def add_adapters(chunks: list[FlowGPTModel], arch: Architecture, config: Config) -> None:
    """Freeze ``chunks`` and give each target of ``--lora-target-modules`` a new adapter.

    Raises:
        ValueError: a layer computes a target otherwise than by one linear (mixture of experts).
    """
    targets = target_modules(config.lora)
    for chunk in chunks:
        chunk.requires_grad_(False)
        for layer in chunk.decoder.layers:
            for block, name, fused in LINEARS:
                if set(fused) & set(targets):
                    linear = getattr(getattr(layer, block), name, None)
                    if linear is None:
                        raise ValueError(
                            f"--lora-target-modules {config.lora.lora_target_modules}: layer "
                            f"{layer.layer_number} has no {'/'.join(fused)} of its own (mixture of "
                            "experts?); leave them out"
                        )
                    _adapt(linear, layer.layer_number, fused, targets, arch, config)
        if chunk.pre_process:
            # A recomputed layer has gradients only where its input does.
            chunk.embedding.register_forward_hook(_require_grad)


def _require_grad(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _adapt(
    linear: Any,
    layer: int,
    fused: tuple[str, ...],
    targets: tuple[str, ...],
    arch: Architecture,
    config: Config,
) -> None:
    tp = parallel.tensor_parallel_size()
    groups, column = arch.padded_groups(tp), fused[0] not in ("o_proj", "down_proj")
    adapters, widths = {}, {}
    for target in fused:
        shape, padded = hf_shape(target, arch), hf_shape(target, arch, groups)
        widths[target] = padded[0] // (groups if "q_proj" in fused else tp if column else 1)
        if target in targets:
            adapter = LowRankAdapter(shape, padded, column, config, linear.config.params_dtype)
            adapter.initialize(config.train.seed, layer, target)
            adapters[target] = adapter
    _attach(linear, adapters, widths)


def adapted_linears(chunks: list[FlowGPTModel]) -> Iterator[AdaptedLinear]:
    """All linears of ``chunks`` that carry adapters."""
    return (m for chunk in chunks for m in chunk.modules() if isinstance(m, AdaptedLinear))


@contextlib.contextmanager
def adapters_off(chunks: list[FlowGPTModel]) -> Iterator[None]:
    """The base model's own computation within."""
    linears = list(adapted_linears(chunks))
    for linear in linears:
        linear.adapters_on = False
    try:
        yield
    finally:
        for linear in linears:
            linear.adapters_on = True
