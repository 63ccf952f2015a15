"""Layouts that the dry run plays, and errors planted into the product that it must see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

MODEL = {
    "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 1024, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 3072,
    "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = {
    **MODEL, "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
TEACHER = {**MODEL, "num_hidden_layers": 6, "hidden_size": 2048, "intermediate_size": 4096}
SHARED = "--use-distributed-optimizer"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PACKED = "--max-tokens-per-microbatch 1200 --pack-sequences"


@dataclass(frozen=True)
class Layout:
    """``ranks`` of ``world``; ``plant``: one of PLANTS; ``stub``: over tests/fake_te."""

    world: int
    ranks: tuple[int, ...]
    flags: str
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    lengths: str = "128,192,384"
    decode: bool = False
    plant: str | None = None
    stub: bool = False


LAYOUTS = {
    "data": Layout(
        2, (0, 1),
        f"{SHARED} --overlap-grad-reduce --overlap-param-gather --teacher ema "
        "--global-batch-size 4",
    ),
    "tensor": Layout(2, (0, 1), f"{TENSOR} --global-batch-size 2 --opsd-top-k 8"),
    "uneven": Layout(
        2, (0, 1),
        f"{SHARED} {PACKED} --pipeline-model-parallel-size 2 --global-batch-size 4 "
        "--num-layers-in-first-pipeline-stage 1",
    ),
    "virtual": Layout(
        2, (0, 1),
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--global-batch-size 4",
    ),
    "context": Layout(
        4, (0, 3), f"{SHARED} {TENSOR} --context-parallel-size 2 --global-batch-size 2"
    ),
    "context, packed": Layout(
        2, (0, 1), f"{SHARED} {PACKED} --context-parallel-size 2 --global-batch-size 4"
    ),
    "experts": Layout(
        4, (0, 1, 2), f"{SHARED} {TENSOR} --expert-model-parallel-size 2 --global-batch-size 4",
        EXPERTS,
    ),
    "adapters": Layout(
        2, (0, 1),
        f"{TENSOR} {PACKED} --lora-rank 64 --teacher ema --opsd-objective policy_gradient "
        "--global-batch-size 4",
    ),
    # Like a published recipe: what adapters keep of long rows is most of the memory.
    "long adapters": Layout(
        2, (0,),
        f"{SHARED} {TENSOR} --max-tokens-per-microbatch 6144 --pack-sequences --lora-rank 64 "
        "--lora-dropout 0.05 --teacher ema --global-batch-size 2",
        {**MODEL, "hidden_size": 2048, "intermediate_size": 6144}, "512,2048,1024",
    ),
    "offload": Layout(
        2, (0,), f"{SHARED} --teacher-offload --teacher ema --global-batch-size 4"
    ),
    "another teacher": Layout(
        2, (0, 1),
        f"{SHARED} --pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-num-layers 1 --global-batch-size 4 --teacher-hf-model TEACHER",
    ),
    "two teachers": Layout(
        2, (0,),
        f"{SHARED} --teacher-hf-model math=TEACHER --teacher-hf-model code=TEACHER "
        "--teacher-offload --global-batch-size 4",
        {**MODEL, "num_hidden_layers": 2},
    ),
    "decode": Layout(
        4, (0, 1, 2),
        f"{TENSOR} --pipeline-model-parallel-size 2 --teacher live --global-batch-size 4",
        decode=True,
    ),
    "engine": Layout(2, (0, 1), f"{SHARED} {TENSOR} --global-batch-size 2", stub=True),
}  # fmt: skip


def _host_weights(patch: pytest.MonkeyPatch) -> None:
    """A tensor made without ``device=``."""
    from megatron_phf.train import student_pass

    loss = student_pass.chunked_divergence

    def on_host(*args: Any, **kwargs: Any) -> Any:
        import torch

        return loss(*args[:4], torch.full(args[4].shape, 0.5), *args[5:], **kwargs)

    patch.setattr(student_pass, "chunked_divergence", on_host)


def _narrow_rows(patch: pytest.MonkeyPatch) -> None:
    """The last stage takes rows without their first channel."""
    from megatron_phf.train import student_pass

    rows = student_pass.part_rows
    patch.setattr(student_pass, "part_rows", lambda *args: rows(*args)[:, 1:])


def _wide_dtype(patch: pytest.MonkeyPatch) -> None:
    """A gradient in fp32 meets weights in bf16."""
    from megatron_phf.train import student_pass

    rows = student_pass.part_rows
    patch.setattr(student_pass, "part_rows", lambda *args: rows(*args).float())


def _no_update(patch: pytest.MonkeyPatch) -> None:
    from megatron_phf.train.optimizer import StudentOptimizer

    patch.setattr(StudentOptimizer, "step", lambda self: (0.0, 1.0))


def _before_metrics(patch: pytest.MonkeyPatch, run: Callable[[], None]) -> None:
    from megatron_phf.train.step import Distiller

    metrics = Distiller.metrics

    def planted(self: Any, *args: Any) -> Any:
        run()
        return metrics(self, *args)

    patch.setattr(Distiller, "metrics", planted)


def _reduce(size: int, group: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(size, device="cuda"), group=group)


def _swapped(patch: pytest.MonkeyPatch) -> None:
    """Rank 1 takes two groups in the other order: each alone is in order."""

    def run() -> None:
        import torch.distributed as dist

        from megatron_phf.runtime import parallel

        groups = [parallel.tensor_parallel_group(), None]
        for group in groups if dist.get_rank() == 0 else groups[::-1]:
            _reduce(3, group)

    _before_metrics(patch, run)


def _another_shape(patch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        import torch.distributed as dist

        _reduce(3 + dist.get_rank(), None)

    _before_metrics(patch, run)


def _left_out(patch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        import torch.distributed as dist

        if dist.get_rank() == 0:
            _reduce(3, None)

    _before_metrics(patch, run)


def _kept(patch: pytest.MonkeyPatch) -> None:
    """A tensor that nobody needs stays from the step's start on."""
    from megatron_phf.train.teacher_pass import TeacherPass

    call, kept = TeacherPass.__call__, []

    def planted(self: Any, *args: Any) -> Any:
        import torch

        kept.append(torch.empty(2**27, dtype=torch.bfloat16, device="cuda"))
        return call(self, *args)

    patch.setattr(TeacherPass, "__call__", planted)


def _asks(patch: pytest.MonkeyPatch) -> None:
    """A layer asks the device for a number."""
    from megatron_phf.hidden.tap import FlowTap

    visit = FlowTap.visit

    def planted(self: Any, layer: int, microbatch: int, inputs: Any, outputs: Any) -> Any:
        outputs.sum().item()
        return visit(self, layer, microbatch, inputs, outputs)

    patch.setattr(FlowTap, "visit", planted)


PLANTS = {
    "host weights": _host_weights,
    "narrow rows": _narrow_rows,
    "wide dtype": _wide_dtype,
    "no update": _no_update,
    "swapped": _swapped,
    "another shape": _another_shape,
    "left out": _left_out,
    "kept": _kept,
    "asks": _asks,
}
_SMALL = {**MODEL, "num_hidden_layers": 2}
HANGS = ("swapped", "another shape", "left out")
PLANTED = {
    name: Layout(
        2, (0, 1) if name in HANGS else (0,), f"{TENSOR} --global-batch-size 1", _SMALL, plant=name
    )
    for name in PLANTS
}
PLANTED["narrow rows"] = Layout(
    2, (1,), "--pipeline-model-parallel-size 2 --global-batch-size 1", _SMALL, plant="narrow rows"
)
