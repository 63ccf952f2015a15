"""The gradient's norm where no fused kernel computes it: exact however large a tensor is.

megatron-core then takes ``torch.norm`` of each whole tensor.  On a CPU that adds up in fp32, a few
sums at a time, which stop growing where the next square is too small for them: 1e-2 is lost of 100
million elements, and it clips by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# So few squares add up to 1e-7 in fp32.
_ROW = 4096


def _square_sum(tensor: Tensor) -> Tensor:
    """The sum of squares in fp64, without a copy of the tensor."""
    flat = tensor.detach().reshape(-1)
    whole = len(flat) // _ROW * _ROW
    parts = (flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1))
    norms = [torch.linalg.vector_norm(p, dim=1, dtype=torch.float32) for p in parts]
    return torch.cat(norms).double().square().sum()


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all ``tensors`` of one device as one vector: a scalar in fp64."""
    return torch.stack([_square_sum(t) for t in tensors]).sum().sqrt()


def _multi_tensor_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> tuple[Tensor, None]:
    """In place of megatron-core's ``local_multi_tensor_l2_norm``: [1] in fp32, on the device."""
    return l2_norm([t for tensors in tensor_lists for t in tensors]).float().reshape(1), None


def install() -> None:
    """Let megatron-core use it where neither Transformer Engine nor apex gave it a kernel."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _multi_tensor_l2_norm
