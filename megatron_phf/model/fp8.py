"""FP8 where the student is trained, and nowhere else.

megatron-core enters Transformer Engine's FP8 context around the layers of a block whose
configuration says so.  Here: what to say there, the passes that must stay out of it, and the
sequence lengths that FP8 GEMMs take.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_phf.config.settings import Config

# One a module; one an expert where they are grouped.
_EXTRA_STATE = re.compile(r"\._extra_state\d*$")


def fp8_settings(config: Config) -> dict[str, Any]:
    """The fields of megatron-core's ``TransformerConfig`` about FP8; none without it.

    Experts pad their own tokens to what the GEMMs take.
    """
    fp8 = config.fp8
    if fp8.fp8_format is None:
        return {}
    return {
        "fp8": fp8.fp8_format,
        "fp8_recipe": fp8.fp8_recipe,
        "fp8_amax_history_len": fp8.fp8_amax_history_len,
        "fp8_amax_compute_algo": fp8.fp8_amax_compute_algo,
        "fp8_param": fp8.fp8_param_gather,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }


def never_trained(config: Config) -> Config:
    """``config`` for a teacher with weights of its own, of which no pass is in FP8 or overlaps."""
    return config.replaced(
        fp8_format=None,
        fp8_param_gather=False,
        first_last_layers_bf16=False,
        tp_comm_overlap=False,
    )


def without_fp8_state(state: dict[str, Any]) -> dict[str, Any]:
    """A (sharded) state dict without what Transformer Engine keeps of FP8 beside the weights.

    Those entries are pickle, which no file that comes from elsewhere may hold, and the other layer
    spec has none of them.  Delayed scaling finds its scales again within a step.
    """
    return {key: value for key, value in state.items() if not _EXTRA_STATE.search(key)}


def before_rounding(parameter: torch.Tensor) -> torch.Tensor | None:
    """What an FP8 parameter was rounded from, on the host; None where that is not kept, or no more.

    megatron-core's distributed optimizer takes its fp32 weights from there, once, and lets it go.
    """
    kept = getattr(parameter, "get_high_precision_init_val", None)
    return None if kept is None else kept()


@contextlib.contextmanager
def unrounded(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """FP8 parameters of ``chunks`` are ordinary ones within, for weights to be read into.

    After, each holds the new weights rounded, and ``before_rounding`` gives them as they were read:
    written into the FP8 parameter alone, they would be forgotten by the optimizer, whose first step
    then puts the random weights back that the model was made with.  Before there is an optimizer.
    """
    swapped = []
    for module in (m for chunk in chunks for m in chunk.modules()):
        for name, parameter in list(module._parameters.items()):
            original = None if parameter is None else before_rounding(parameter)
            if parameter is not None and original is not None:
                plain = torch.nn.Parameter(original.to(parameter.device, copy=True))
                swapped.append((module, name, parameter, plain, original))
                module._parameters[name] = plain
    try:
        yield
    finally:
        for module, name, parameter, plain, original in swapped:
            module._parameters[name] = parameter
            with torch.no_grad():
                parameter.copy_(plain)
                original.copy_(plain)


def state_before_rounding(chunk: torch.nn.Module) -> dict[str, Any]:
    """The state dict of ``chunk``; FP8 weights as they were read, where that is still kept."""
    kept = {name: before_rounding(p) for name, p in chunk.named_parameters()}
    return chunk.state_dict() | {name: p for name, p in kept.items() if p is not None}


def alignment(config: TransformerConfig) -> int:
    """What the tokens of a sequence in one process must be a multiple of: FP8 GEMMs' sizes."""
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1


def module_configs(chunk: torch.nn.Module) -> list[Any]:
    """The different configurations that the modules of ``chunk`` hold: experts keep a copy."""
    return list({id(m.config): m.config for m in chunk.modules() if hasattr(m, "config")}.values())


@contextlib.contextmanager
def fp8_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """``chunks`` compute in their own dtype within, and leave FP8's scales alone."""
    configs = [c for chunk in chunks for c in module_configs(chunk) if getattr(c, "fp8", None)]
    formats = [c.fp8 for c in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, value in zip(configs, formats, strict=True):
            config.fp8 = value


@contextlib.contextmanager
def outside_fp8(config: TransformerConfig) -> Iterator[None]:
    """Within a layer of an FP8 context: what is not the layer's own stays out of it."""
    if not config.fp8:
        yield
        return
    from transformer_engine.pytorch import fp8_autocast

    with fp8_autocast(enabled=False):
        yield
