"""Tensor-parallel communication behind GEMMs (--tp-comm-overlap): Transformer Engine's userbuffers.

Their buffers have one shape, tokens x hidden size, and Transformer Engine refuses any other
(``copy_into_buffer`` and ``get_buffer`` of its comm_gemm_overlap.cpp).  So each row of the
student's training pass has the same number of tokens, and all other passes do without: Transformer
Engine's linears look at their ``ub_`` attributes in each forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from megatron_phf.config.settings import Config
from megatron_phf.data.microbatches import round_up

_SWITCHES = (
    "ub_overlap_ag_fprop",
    "ub_overlap_rs_fprop",
    "ub_overlap_ag_dgrad",
    "ub_overlap_rs_dgrad",
    "ub_bulk_dgrad",
    "ub_bulk_wgrad",
)


def fixed_row_length(config: Config, multiple: int) -> int | None:
    """Tokens of every packed row, the budget rounded up to ``multiple``; None: they differ."""
    if not config.parallel.tp_comm_overlap:
        return None
    return round_up(config.batching.max_tokens_per_microbatch, multiple)


def initialize_userbuffers(transformer: TransformerConfig, tokens: int) -> None:
    """Allocate the buffers for rows of ``tokens``, of which context parallelism leaves a part.

    Before the layers are made; once a process, on every rank.

    Raises:
        ValueError: Transformer Engine is too old.
    """
    if not is_te_min_version("2.0.0"):
        raise ValueError("--tp-comm-overlap needs Transformer Engine 2.0 or newer")
    from transformer_engine.pytorch.module import base

    options: dict[str, Any] = {"use_fp8": transformer.fp8 is not None}
    if is_te_min_version("2.7.0"):
        modes = base.UserBufferQuantizationMode
        options = {"quantization_modes": [modes.FP8 if transformer.fp8 else modes.NONE]}
    base.initialize_ub(
        shape=[tokens // transformer.context_parallel_size, transformer.hidden_size],
        tp_size=transformer.tensor_model_parallel_size,
        bootstrap_backend="nccl",
        **options,
    )


@contextlib.contextmanager
def switched_off(owners: Sequence[Any], names: Sequence[str] = _SWITCHES) -> Iterator[None]:
    """Attributes ``names`` of ``owners`` that are True are False within."""
    changed = [(x, name) for x in owners for name in names if getattr(x, name, False) is True]
    for owner, name in changed:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)


def userbuffers_off(chunks: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    """No userbuffers within: rows there may have any length, and no FP8."""
    return switched_off([module for chunk in chunks for module in chunk.modules()])
