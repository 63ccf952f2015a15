"""Output head and divergence in one, a chunk of tokens at a time: logits never pile up.

Projecting n tokens to a vocabulary of v entries takes n v numbers for each model and several more
for the divergence; here they exist for ``chunk_tokens`` tokens at a time.  The gradient of a chunk
is computed while its logits exist, so that backward only scales what was kept: the gradients of
the rows [n, h] and of the weight [v, h].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.losses._vocab_parallel import (
    VocabShard,
    divergence_chunk,
    sampled_token_chunk,
    vocab_shard,
)
from megatron_phf.losses.divergence import DivergenceSpec
from megatron_phf.losses.objectives import OBJECTIVES, Divergence, SampledToken
from megatron_phf.runtime import private_names

# Bytes of one block's entries in fp32, of which about 11 tensors exist at a time.  A CPU's caches
# are small.  On a GPU a pass over a block (about 0.1 ms) must outlast the launch of its kernel by
# far: a chunk of 256 tokens is two blocks of Qwen3's 151,936 entries.
_BLOCK_BYTES = {"cuda": 2**27, "cpu": 2**22}


class ChunkedDivergence(NamedTuple):
    """``loss`` [] with gradient; the rest [n], detached, as in ``DivergenceOutput``.

    ``student_entropy``: nats; ``agreement``: 1 where both models have the same most probable entry,
    else 0.  With ``top_k``, all of it among the teacher's k.
    """

    loss: Tensor
    per_token: Tensor
    clipped: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class _Problem:
    """Everything that is not differentiated."""

    teacher_rows: Tensor
    teacher_weight: Tensor
    token_weights: Tensor
    spec: DivergenceSpec
    shard: VocabShard
    chunk_tokens: int
    target_ids: Tensor | None
    objective: Divergence | SampledToken


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two 16-bit matrices as their sums are, in fp32: not rounded."""
    # Since torch 2.8, on CUDA alone; there is no fp32 sum in place that every such version takes.
    if left.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _Gradients:
    """Gradients of one loss, added up over chunks (None where not wanted)."""

    def __init__(self, rows: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> None:
        self._weight = weight
        self.rows = torch.zeros_like(rows) if wanted[0] else None
        # bf16 sums over many chunks would lose the small ones.
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None

    def add(self, part: slice, rows: Tensor, d_logits: Tensor) -> None:
        """d_logits [c, v] of the tokens ``part`` with the inputs ``rows`` [c, h]."""
        d_logits = d_logits.to(self._weight.dtype)
        real = d_logits.shape[1]
        if self.rows is not None:
            torch.mm(d_logits, self._weight[:real], out=self.rows[part])
        if self.weight is None:
            return
        if self.weight.dtype is d_logits.dtype:
            self.weight[:real].addmm_(d_logits.T, rows)
            return
        # The product of a chunk in fp32, a block of entries at a time: one of the whole head would
        # be as large as the sum itself.
        size = max(1, _BLOCK_BYTES[rows.device.type] // (4 * rows.shape[1]))
        for start in range(0, real, size):
            block = slice(start, min(start + size, real))
            self.weight[block] += _wide_product(d_logits[:, block].T, rows)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, problem: _Problem) -> Any:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        gradients = _Gradients(rows, weight, wanted)
        outputs = []
        for start in range(0, rows.shape[0], problem.chunk_tokens):
            part = slice(start, min(start + problem.chunk_tokens, rows.shape[0]))
            values, d_logits = _run_chunk(rows[part], weight, part, problem, any(wanted))
            outputs.append(values)
            if d_logits is not None:
                gradients.add(part, rows[part], d_logits)
            del d_logits  # else it lives on beside the next chunk's two logits
        if gradients.rows is not None and problem.shard.group is not None:
            # Each rank has the part that its vocabulary rows contribute.
            dist.all_reduce(gradients.rows, group=problem.shard.group)
        empty = problem.token_weights.new_zeros(5, 0)
        values = torch.cat([empty, *outputs], dim=1)
        ctx.save_for_backward(gradients.rows, gradients.weight)
        ctx.dtypes = (rows.dtype, weight.dtype)
        ctx.mark_non_differentiable(values)
        return (values[0] * problem.token_weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # A second copy of the head's gradient would be the largest tensor here: the kept one is
        # scaled in place, unless another backward pass may need it.
        kept = private_names.keeps_graph()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        d_rows, d_weight = (
            None if g is None else (g * grads[0] if kept else g.mul_(grads[0])).to(d)
            for g, d in pairs
        )
        return d_rows, d_weight, None


def _block_rows(rows: int, entries: int, device: str) -> int:
    """Rows of a block, of ``rows`` with ``entries`` each: equal blocks on a GPU, none too large."""
    most = max(1, _BLOCK_BYTES[device] // (4 * max(1, entries)))
    if device == "cpu":
        return most
    return -(-rows // -(-rows // most)) if rows else most


def _run_chunk(
    rows: Tensor, weight: Tensor, part: slice, problem: _Problem, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Values [5, c] and, if wanted, the weighted loss's gradient in the raw logits [c, real].

    Matrix products take the whole chunk.  What is done entry by entry goes a block of rows at a
    time, whose temporaries are small; the gradient takes the place of the student's logits.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    temperature = problem.spec.temperature
    real = problem.shard.size  # padding comes last: without its columns it has no probability
    student = rows @ weight[:real].T
    teacher = problem.teacher_rows[part] @ problem.teacher_weight[:real].T
    targets = None if problem.target_ids is None else problem.target_ids[part]
    scale = (problem.token_weights[part] / temperature)[:, None]
    outputs = []
    # Of the largest shard, as all ranks exchange numbers block by block.
    size = _block_rows(len(rows), weight.shape[0], weight.device.type)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        s, t = (x[block].to(wide).div_(temperature) for x in (student, teacher))
        if isinstance(problem.objective, Divergence):
            values, gradient = divergence_chunk(
                s, t, problem.objective, problem.spec, problem.shard, with_gradient
            )
        else:
            assert targets is not None
            values, gradient = sampled_token_chunk(
                s, t, problem.objective, targets[block], problem.shard, with_gradient
            )
        outputs.append(values.to(problem.token_weights.dtype))
        if gradient is not None:
            student[block] = gradient.mul_(scale[block])
    return torch.cat(outputs, dim=1), student if with_gradient else None


def chunked_divergence(
    student_rows: Tensor,
    teacher_rows: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    spec: DivergenceSpec,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk_tokens: int = 256,
    target_ids: Tensor | None = None,
    objective: str = "jsd",
) -> ChunkedDivergence:
    """rows [n, h_S], [n, h_T]; weights [v_local, h_S], [v_local, h_T]; token_weights [n] -> loss.

    ``loss`` = sum over tokens of weight x what ``objective``, a row of ``OBJECTIVES``, has for the
    token; losses of sampled tokens take those from ``target_ids`` [n] (global ids).  Its gradient
    goes to student_rows and student_weight.

    Args:
        group: tensor-parallel group over which the vocabulary is sharded; rows are then equal on
            all its ranks, and so is the gradient of the rows afterwards.
        vocab_start: global id of this rank's first row of the weights.
        vocab_size: entries from this id on are padding: probability 0, no gradient.
        chunk_tokens: tokens whose logits exist at the same time.
    """
    row = OBJECTIVES[objective]
    assert target_ids is not None or not row.needs_targets, f"{objective} needs target_ids"
    assert chunk_tokens >= 1, f"chunk_tokens {chunk_tokens}: need at least 1"
    shard = vocab_shard(group, vocab_start, student_weight.shape[0], vocab_size)
    problem = _Problem(
        teacher_rows.detach(),
        teacher_weight.detach(),
        token_weights,
        spec,
        shard,
        chunk_tokens,
        target_ids,
        row,
    )
    loss, values = _Chunked.apply(student_rows, student_weight, problem)
    return ChunkedDivergence(loss, *values.unbind())
