"""Output divergence: head and divergence in chunks against the version that holds all logits.

    python -m benchmarks.divergence '{"what": "time", "tokens": 2048, "rounds": 3}'
    python -m benchmarks.divergence '{"what": "memory", "variant": "ours", "tokens": 2048}'

Both compute KL(teacher || student) with the entry clip, forward and backward, to the gradients of
the student's rows and of its head; hidden 1,024, vocabulary 151,936, fp32.  Under torchrun the
vocabulary is sharded over the processes, for both.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor

from benchmarks.harness import Spread, interleaved, peak_over_start, ratio, report
from megatron_phf.losses import DivergenceSpec, chunked_divergence, generalized_jsd
from megatron_phf.losses.objectives import jsd_terms

HIDDEN, VOCABULARY = 1024, 151936
SPEC = DivergenceSpec()


@dataclass
class Inputs:
    """Rows [n, h] and heads [v, h] of student and teacher; ``group``: shares the vocabulary."""

    student: Tensor
    teacher: Tensor
    student_head: Tensor
    teacher_head: Tensor
    group: dist.ProcessGroup | None = None

    def clear(self) -> None:
        """No gradients."""
        self.student.grad = self.student_head.grad = None


def make_inputs(tokens: int) -> Inputs:
    """Random ones whose distributions are about as sharp as a language model's; this rank's shard.

    The heads of student and teacher are tensors of their own, as they are in training.
    """
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale)

    student, head = normal(tokens, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.08)
    teacher = student + normal(tokens, HIDDEN, scale=0.3)
    group = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
        head = head.chunk(dist.get_world_size())[dist.get_rank()].clone()
    return Inputs(student.requires_grad_(), teacher, head.clone().requires_grad_(), head, group)


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the shards of all ranks, for autograd."""
    top = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = differentiable.all_reduce((logits - top).exp().sum(-1, keepdim=True))
    return logits - top - total.log()


def whole(x: Inputs) -> None:
    """Plain PyTorch: both logits (of this rank's shard), everything else by autograd."""
    student, teacher = x.student @ x.student_head.T, x.teacher @ x.teacher_head.T
    if x.group is None:
        generalized_jsd(student, teacher, SPEC).per_token.mean().backward()
        return
    log_s, log_t = (_log_softmax(x / SPEC.temperature) for x in (student, teacher))
    terms = jsd_terms(log_s, log_t, SPEC.beta).clamp(max=SPEC.clip)
    terms.sum(-1).mean().backward()  # the loss is the sum over the ranks
    dist.all_reduce(x.student.grad)


def chunked(x: Inputs, chunk: int = 256) -> None:
    """The product's."""
    weights = torch.full((len(x.student),), 1 / len(x.student))
    start = 0 if x.group is None else dist.get_rank() * len(x.student_head)
    chunked_divergence(
        x.student, x.teacher, x.student_head, x.teacher_head, weights, SPEC,
        chunk_tokens=chunk, group=x.group, vocab_start=start,
    ).loss.backward()  # fmt: skip


def _run(step: Callable[[Inputs], None], x: Inputs) -> Callable[[], None]:
    def call() -> None:
        x.clear()
        step(x)

    return call


def time(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds, and the largest difference of the gradients relative to their norms."""
    x = make_inputs(tokens)
    gradients = []
    for step in (chunked, whole):
        _run(step, x)()
        gradients.append((x.student.grad, x.student_head.grad))
    x.clear()
    difference = max(
        float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True) if b is not None
    )
    del gradients
    times = interleaved({"ours": _run(chunked, x), "whole": _run(whole, x)}, rounds, warm=True)
    return {
        "time_ratio": ratio(times["ours"], times["whole"]).as_json(),
        "seconds": {name: Spread.of(values).as_json() for name, values in times.items()},
        "gradient_difference": difference,
    }


def memory(variant: str, tokens: int, chunk: int = 256) -> dict[str, Any]:
    """Peak beyond inputs and gradients, in this fresh process."""
    x = make_inputs(tokens)
    torch.mm(x.student[:8].detach(), x.teacher_head.T[:, :8])  # the math library's own buffers
    peak = peak_over_start(lambda: whole(x) if variant == "whole" else chunked(x, chunk))
    return {"peak_bytes": peak - x.student.nbytes - x.student_head.nbytes}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    report({"time": time, "memory": memory}[arguments.pop("what")](**arguments))
    if dist.is_initialized():
        dist.destroy_process_group()
