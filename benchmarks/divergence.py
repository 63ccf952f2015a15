"""Output divergence: head and divergence in chunks against the version that holds all logits.

    python -m benchmarks.divergence '{"what": "time", "tokens": 2048, "rounds": 3}'
    python -m benchmarks.divergence '{"what": "memory", "variant": "ours", "tokens": 2048}'

Both compute KL(teacher || student) with the entry clip, forward and backward, to the gradients of
the student's rows and of its head; hidden 1,024, vocabulary 151,936, fp32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import interleaved, peak_over_start, ratio
from megatron_phf.losses import DivergenceSpec, chunked_divergence, generalized_jsd

HIDDEN, VOCABULARY = 1024, 151936
SPEC = DivergenceSpec()


@dataclass
class Inputs:
    """Rows [n, h] and heads [v, h] of student and teacher."""

    student: Tensor
    teacher: Tensor
    student_head: Tensor
    teacher_head: Tensor

    def clear(self) -> None:
        """No gradients."""
        self.student.grad = self.student_head.grad = None


def make_inputs(tokens: int, vocabulary: int = VOCABULARY) -> Inputs:
    """Random ones whose distributions are about as sharp as a language model's."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale)

    student, head = normal(tokens, HIDDEN), normal(vocabulary, HIDDEN, scale=0.08)
    teacher = student + normal(tokens, HIDDEN, scale=0.3)
    return Inputs(student.requires_grad_(), teacher, head.clone().requires_grad_(), head)


def whole(x: Inputs) -> Tensor:
    """Plain PyTorch: both logits, autograd through the library's whole-logits divergence."""
    found = generalized_jsd(x.student @ x.student_head.T, x.teacher @ x.teacher_head.T, SPEC)
    return found.per_token.mean()


def chunked(x: Inputs, chunk: int = 256, group: Any = None, start: int = 0) -> Tensor:
    """The product's."""
    weights = torch.full((len(x.student),), 1 / len(x.student))
    return chunked_divergence(
        x.student, x.teacher, x.student_head, x.teacher_head, weights, SPEC,
        chunk_tokens=chunk, group=group, vocab_start=start,
    ).loss  # fmt: skip


def _run(loss: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], None]:
    def call() -> None:
        x.clear()
        loss(x).backward()

    return call


def time(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds, and the largest difference of the gradients relative to their norms."""
    x = make_inputs(tokens)
    gradients = []
    for loss in (chunked, whole):
        _run(loss, x)()
        gradients.append((x.student.grad, x.student_head.grad))
    x.clear()
    difference = max(
        float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True) if b is not None
    )
    del gradients
    times = interleaved({"ours": _run(chunked, x), "whole": _run(whole, x)}, rounds)
    return {
        "time_ratio": ratio(times["ours"], times["whole"]).as_json(),
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in times.items()},
        "gradient_difference": difference,
    }


def memory(variant: str, tokens: int, chunk: int = 256) -> dict[str, Any]:
    """Peak beyond inputs and gradients, in this fresh process."""
    x = make_inputs(tokens)
    loss = whole if variant == "whole" else lambda inputs: chunked(inputs, chunk)
    torch.mm(x.student[:8].detach(), x.teacher_head.T[:, :8])  # the math library's own buffers
    peak = peak_over_start(lambda: loss(x).backward())
    return {"peak_bytes": peak - x.student.nbytes - x.student_head.nbytes}


def sharded(tokens: int, rounds: int) -> dict[str, Any]:
    """Under torchrun: vocabulary over the ranks, against the whole in one process's share of it."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    part = VOCABULARY // size
    x = make_inputs(tokens)
    mine = Inputs(
        x.student,
        x.teacher,
        x.student_head.detach()[rank * part :][:part].clone().requires_grad_(),
        x.teacher_head[rank * part :][:part].clone(),
    )
    group = dist.group.WORLD
    ours = _run(lambda inputs: chunked(inputs, 256, group, rank * part), mine)
    peak = peak_over_start(ours)
    rows = None if mine.student.grad is None else mine.student.grad.clone()
    x.clear()
    _run(chunked, x)()
    assert x.student.grad is not None and rows is not None
    difference = float((rows - x.student.grad).norm() / x.student.grad.norm())
    times = interleaved({"ours": ours}, rounds)["ours"]
    dist.barrier()
    dist.destroy_process_group()
    return {"peak_bytes": peak, "seconds": min(times), "gradient_difference": difference}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    function = {"time": time, "memory": memory, "sharded": sharded}[arguments.pop("what")]
    print(json.dumps(function(**arguments)))
