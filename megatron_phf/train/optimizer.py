"""megatron-core's DDP, optimizer and learning-rate schedule around the student."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_phf.config.schedule import decay_iters
from megatron_phf.config.settings import Config, TrainConfig
from megatron_phf.model.gpt import FlowGPTModel, wait_for_weights
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.runtime import device
from megatron_phf.train import adam_state


class StudentOptimizer:
    """AdamW on the student's chunks; gradients in fp32, reduced over data-parallel ranks."""

    def __init__(self, chunks: list[FlowGPTModel], config: Config) -> None:
        train, dtype = config.train, model_dtype(config)
        self._distributed = distributed = config.parallel.use_distributed_optimizer
        overlap = config.parallel.overlap_grad_reduce
        self._chunks, self._overlap_gather = chunks, config.parallel.overlap_param_gather
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=overlap,
            overlap_param_gather=self._overlap_gather,
            fp8_param_gather=config.fp8.fp8_param_gather,
        )
        transformer = chunks[0].config
        self.wrapped = [DistributedDataParallel(transformer, ddp, chunk) for chunk in chunks]
        if overlap:  # in the last microbatch's backward pass alone
            no_sync = [chunk.no_sync for chunk in self.wrapped]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if self._overlap_gather:
            # They wait in a module's forward, but decoding, averages and exports read weights
            # directly, and a rank without a batch has no forward: see ``wait_for_weights``.
            for chunk in self.wrapped:
                chunk.disable_forward_pre_hook(param_sync=False)
        transformer.finalize_model_grads_func = finalize_model_grads
        options = OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            # Megatron reports a gradient norm only where it clips.
            clip_grad=train.clip_grad or math.inf,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
            overlap_param_gather=self._overlap_gather,
            fp8_recipe=config.fp8.fp8_recipe if config.fp8.fp8_format else None,
        )
        with device.cuda_type_names():
            self.optimizer = get_megatron_optimizer(options, self.wrapped)
        self._train, self._batch = train, train.global_batch_size
        #: Steps that the learning rate decays over.
        self.lr_decay_iters = decay_iters(train)
        self._schedule = _schedule(self.optimizer, train, self.lr_decay_iters)

    def make_state(self) -> None:
        """Zero moments, which the first step makes otherwise."""
        for each in self.optimizer.chained_optimizers:
            adam_state.allocate(each.optimizer)

    def zero_grad(self) -> None:
        """Before the first microbatch of a step."""
        wait_for_weights(self._chunks)
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gradients_finite(self) -> torch.Tensor:
        """Whether every gradient of this rank is finite (after the reduction): bool []."""
        sums = [b.grad_data.sum() for chunk in self.wrapped for b in _buffers(chunk)]
        return torch.stack([torch.zeros((), device=device.device()), *sums]).isfinite().all()

    def step(self) -> tuple[float, float]:
        """Clip and update the weights; (learning rate used, gradient norm before clipping)."""
        learning_rate = self.learning_rate
        with device.cuda_type_names(), self._one_gather():
            _, grad_norm, _ = self.optimizer.step()
        if self._overlap_gather:
            for chunk, wrapped in zip(self._chunks, self.wrapped, strict=True):
                wrapped.start_param_sync()
                chunk.arriving = functools.partial(_finish_param_sync, wrapped)
        self._schedule.step(increment=self._batch)
        return learning_rate, float(grad_norm)

    @contextlib.contextmanager
    def _one_gather(self) -> Iterator[None]:
        """The updated weights are gathered once, behind the last of megatron-core's optimizers.

        Each gathers those of all, and experts under expert parallelism have one of their own.
        """
        if len(self.optimizer.chained_optimizers) == 1 or self._overlap_gather:
            yield
            return
        gathers = [chunk.start_param_sync for chunk in self.wrapped]
        for chunk in self.wrapped:
            chunk.start_param_sync = lambda *args, **kwargs: None
        try:
            yield
        finally:
            for chunk in self.wrapped:
                del chunk.start_param_sync
        if self._distributed:
            for gather in gathers:
                gather()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def schedule_steps(self) -> int:
        """Steps that changed the weights."""
        return self._schedule.num_steps // self._batch

    def sharded_state_dict(self, weights: dict[str, Any], loading: bool) -> dict[str, Any]:
        """Moments and fp32 weights for dist_checkpointing; ``weights``: the student's.

        megatron-core's default for the distributed optimizer, ``fully_sharded_model_space``, cuts
        tensors by ``flattened_range``, which its own ShardedTensor no longer accepts
        (``validate_metadata_integrity``, on any device).  ``fully_reshardable`` has whole tensors.
        """
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
        }
        self.make_state()
        with device.cuda_type_names():
            return self.optimizer.sharded_state_dict(weights, loading, metadata=metadata)

    def load_state_dict(
        self,
        asked: dict[Any, Any],
        saved: dict[Any, Any],
        schedule_steps: int,
        lr_decay_iters: int,
    ) -> None:
        """What was ``asked`` by :meth:`sharded_state_dict`, and what a checkpoint gave for it.

        It may have been saved in another layout and with another kind of Adam.  Without
        --lr-decay-iters the rate goes on over ``lr_decay_iters``, as it began, so that another
        --train-iters makes it no jump.
        """
        step, each = adam_state.steps_taken(saved), self.optimizer.chained_optimizers
        with device.cuda_type_names():
            for number, optimizer in enumerate(each):
                alone = len(each) == 1
                ask, part = (asked, saved) if alone else (asked[number], saved[number])
                _load(optimizer, adam_state.restored(optimizer.optimizer, ask, part, step))
        if self._train.lr_decay_iters is None:
            self.lr_decay_iters = lr_decay_iters
        self._schedule = _schedule(self.optimizer, self._train, self.lr_decay_iters)
        self._schedule.step(increment=schedule_steps * self._batch)


def _buffers(chunk: DistributedDataParallel) -> list:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _finish_param_sync(chunk: DistributedDataParallel) -> None:
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _load(optimizer: Any, state: dict[str, Any]) -> None:
    """megatron-core's load, with torch's Adam under a distributed optimizer put right.

    That keeps a step a parameter, which megatron-core saves once, restores as one tensor for all
    (each parameter would then count it up), and misses when it copies the moments.
    """
    moments = state.pop("param_state", None)
    optimizer.load_state_dict(state)
    if moments is None:
        return
    per_parameter = optimizer.optimizer.state
    steps = {p: s.pop("step").clone() for p, s in per_parameter.items() if "step" in s}
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        per_parameter[parameter]["step"] = step


def _schedule(optimizer: object, train: TrainConfig, decay: int) -> OptimizerParamScheduler:
    """Megatron-LM's schedule, which counts samples: only the inverse square root can tell.

    Warm-up of the embedded task may be longer than its steps; elsewhere that is refused.
    """
    batch, fraction = train.global_batch_size, train.lr_warmup_fraction
    warmup = train.lr_warmup_iters if fraction is None else fraction * decay
    wsd = train.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup * batch,
        lr_decay_steps=max(decay, train.lr_warmup_iters + 1) * batch,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.train_iters * batch,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else wsd * batch,
        lr_wsd_decay_style=train.lr_wsd_decay_style,
    )
