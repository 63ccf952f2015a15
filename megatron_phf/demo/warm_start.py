"""Supervised training on worked solutions: gives the embedded task's tiny model its language."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.data.batch import flow_window, make_local_batch
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden.rows import gather_rows
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel, sequence_shards
from megatron_phf.runtime import device, parallel
from megatron_phf.train.batch import PlacedBatch, place
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.pipeline import run_pipeline

_AVERAGED_STEPS = 10


def cross_entropy(
    chunk: FlowGPTModel, hidden: Tensor, batch: PlacedBatch, vocab_size: int
) -> Tensor:
    """hidden [s, b, h] -> sum over the response tokens of -log p, nats."""
    rows = gather_rows(hidden, batch.scored, sequence_shards(chunk.config))
    rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows)
    logits = (rows @ chunk.output_weight().T).float().unsqueeze(1)
    first = parallel.tensor_parallel_rank() * logits.shape[-1]
    padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= vocab_size
    logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
    targets = batch.targets.unsqueeze(1)
    return tensor_parallel.vocab_parallel_cross_entropy(logits, targets).sum()


def supervised_step(
    student: list[FlowGPTModel],
    optimizer: StudentOptimizer,
    examples: Sequence[Rollout],
    arch: Architecture,
    micro_batch_size: int,
) -> float:
    """One step on this rank's ``examples``: their responses after student *and* teacher prompts.

    Returns the mean -log p a token, nats, over the global batch.
    """
    shards = sequence_shards(student[0].config)
    both = [
        Rollout(prompt, prompt, e.response_ids)
        for e in examples
        for prompt in (e.student_prompt_ids, e.teacher_prompt_ids)
    ]
    batch = make_local_batch(
        both,
        micro_batch_size,
        flow_window(2, "even"),
        length_multiple=shards.multiple_with(device.row_multiple()),
    )
    batches = [place(m.student, shards) for m in batch.microbatches]
    count = torch.tensor([float(batch.num_tokens)], device=device.device())
    total = float(parallel.sum_over_data_parallel(count))
    # As in Distiller: undo the schedule's and DDP's averaging.
    scale = len(batches) * parallel.data_parallel_size() / total

    def loss(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        value = cross_entropy(student[-1], hidden, batches[index], arch.vocab_size)
        return value * scale, value.detach()

    optimizer.zero_grad()
    reported = run_pipeline(optimizer.wrapped, batches, loss, shards, forward_only=False)
    optimizer.step()
    nats = torch.stack([torch.zeros((), device=count.device), *reported]).sum()
    if parallel.tensor_parallel_rank() > 0:
        nats.zero_()
    torch.distributed.all_reduce(nats)
    return float(nats) / total


def warm_start(
    student: list[FlowGPTModel],
    arch: Architecture,
    config: Config,
    examples: Sequence[Rollout],
) -> list[float]:
    """Train ``student`` until ``warm_start_loss`` or ``warm_start_iters``; each step's loss.

    The task is learned suddenly: a fixed number of steps would start the methods from anywhere
    between chance and perfection, by the rounding of the machine.
    """
    settings = config.embedded
    recipe = config.replaced(
        lr=settings.warm_start_lr,
        train_iters=settings.warm_start_iters,
        lr_decay_iters=None,
        lr_warmup_iters=min(50, settings.warm_start_iters // 2),
        lr_warmup_fraction=None,
        clip_grad=1.0,
    )
    optimizer = StudentOptimizer(student, recipe)
    size = recipe.train.global_batch_size
    losses = []
    for iteration in range(settings.warm_start_iters):
        rows = [(iteration * size + i) % len(examples) for i in range(size)]
        local = parallel.local_share([examples[i] for i in rows])
        losses.append(
            supervised_step(student, optimizer, local, arch, recipe.train.micro_batch_size)
        )
        recent = losses[-_AVERAGED_STEPS:]
        if len(recent) == _AVERAGED_STEPS and sum(recent) / len(recent) < settings.warm_start_loss:
            break
    return losses
