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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.lora.adapter import LowRankAdapter
from megatron_phf.lora.config import LINEARS, hf_shape, target_modules
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.runtime import parallel


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model chunk, by its name, belongs to an adapter."""
    return ".adapters." in name


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
        if self.adapters_on and torch.is_grad_enabled():
            output = output + self._delta(x, output)
        elif self.adapters_on:  # nobody needs the sum's parts: no copies of a wide output
            for adapter, part in self._parts(output):
                part += adapter(x, self.sequence_parallel).view_as(part)  # type: ignore[attr-defined]
        return output, bias

    def add_adapters_(self, x: Tensor, output: Tensor) -> None:
        """What the adapters add, into ``output`` (see ``LowRankAdapter.add_``)."""
        if self.adapters_on:
            for adapter, part in self._parts(output):
                adapter.add_(x, part)

    def _parts(self, output: Tensor) -> Iterator[tuple[LowRankAdapter, Tensor]]:
        """Each adapter and its channels of ``output``: views [s, b, groups, channels]."""
        widths = list(self.widths.values())
        parts = output.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        for target, part in zip(self.widths, parts, strict=True):
            if target in self.adapters:
                yield self.adapters[target], part

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
