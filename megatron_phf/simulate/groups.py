"""The other ranks: process groups without processes, and what they would have said."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megatron_phf.config.settings import Config
from megatron_phf.model.gpt_config import transformer_config
from megatron_phf.runtime import parallel
from megatron_phf.simulate import torch_names
from megatron_phf.simulate.mode import FakeCuda
from megatron_phf.teacher.architecture import Models, teacher_config
from megatron_phf.train import student_pass, teacher_pass


def join(sim: FakeCuda, config: Config, world: int, rank: int) -> None:
    """This process becomes ``rank`` of ``world``, and splits the world as a job would."""
    dist.init_process_group("fake", store=torch_names.FakeStore(), rank=rank, world_size=world)
    make, post = dist.new_group, dist.batch_isend_irecv
    module: Any = dist

    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("backend", "device_id")}
        return make(*args, backend="fake", **kwargs)

    def batch_isend_irecv(operations: Any) -> Any:
        sim.events.batch = len(sim.events.operations)
        try:
            return post(operations)
        finally:
            sim.events.batch = None

    module.new_group = new_group
    module.distributed_c10d.new_group = new_group
    module.batch_isend_irecv = batch_isend_irecv
    parallel.initialize(config.parallel)


@contextlib.contextmanager
def other_stages(models: Models, config: Config) -> Iterator[None]:
    """Within, the pipeline's stages say which layers each of them has."""
    gather = parallel.gather_over_pipeline
    every = _layer_numbers(models, config)

    def gather_over_pipeline(value: Any) -> list[Any]:
        mine = every[parallel.pipeline_rank()]
        assert value == mine, f"stages gather {value} where layers {mine} were expected"
        return every

    parallel.gather_over_pipeline = gather_over_pipeline
    try:
        yield
    finally:
        parallel.gather_over_pipeline = gather


def _layer_numbers(models: Models, config: Config) -> list[list[list[int]]]:
    """The numbers (1-based) of the student's and the teacher's layers on each stage."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    def of(model: Any, stage: int) -> list[int]:
        virtual = model.virtual_pipeline_model_parallel_size
        numbers: list[int] = []
        for v in [None] if virtual is None else range(virtual):
            first = get_transformer_layer_offset(model, v, stage) + 1
            numbers += range(first, first + get_num_layers_to_build(model, v, stage))
        return numbers

    both = [transformer_config(models.student, config)] * 2
    if models.other is not None:
        both[1] = transformer_config(models.other, teacher_config(config))
    return [[of(m, stage) for m in both] for stage in range(parallel.pipeline_size())]


class Shapes:
    """Shapes [s, b, h] of the microbatches on their way, as neighbouring stages announce them."""

    def __init__(self) -> None:
        self._next: dict[str, Iterator[tuple[int, int, int]]] = {}
        #: Tokens of the largest microbatch of the student.
        self.tokens = 0

    def install(self) -> None:
        """The product's passes run with the shapes known."""
        for module in (student_pass, teacher_pass):
            module.run_pipeline = self._noting(module.run_pipeline)  # type: ignore[attr-defined]
        torch_names.replace_shape_exchange(self._announced)

    def _noting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_pipeline(
            chunks: Sequence[Any], batches: Sequence[Any], loss: Any, shards: Any, **kwargs: Any
        ) -> Any:
            model = getattr(chunks[0], "module", chunks[0])
            parts = shards.context_size * shards.sequence_size
            hidden = model.config.hidden_size
            shapes = [(b.shape[1] // parts, b.shape[0], hidden) for b in batches]
            self._next = {"before": iter(shapes), "after": iter(shapes)}
            if not kwargs["forward_only"]:
                self.tokens = max(math.prod(b.shape) for b in batches)
            return run(chunks, batches, loss, shards, **kwargs)

        return run_pipeline

    def _announced(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def communicate_shapes(
            communicator: Any, to_next: Any, to_previous: Any, from_previous: bool, from_next: bool
        ) -> tuple[list[int], list[int]]:
            exchange(communicator, to_next, to_previous, from_previous, from_next)
            before = next(self._next["before"]) if from_previous else (0, 0, 0)
            after = next(self._next["after"]) if from_next else (0, 0, 0)
            return list(before), list(after)

        return communicate_shapes
