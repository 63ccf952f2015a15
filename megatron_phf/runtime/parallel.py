"""Process groups: their creation, and the few facts and reductions the rest of the code needs.

The only reader of megatron-core's ``parallel_state``.  The model is tensor- and pipeline-parallel;
"model-parallel group" below means the ranks of one copy of it (TP x PP).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_phf.config.settings import ParallelConfig
from megatron_phf.runtime import device, private_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def initialize(config: ParallelConfig) -> None:
    """Split the default process group; the sizes were checked before (preflight)."""
    virtual = config.num_virtual_stages_per_pipeline_rank
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )


def seed(value: int) -> None:
    """Seed torch, and megatron's generators, which differ between model-parallel ranks."""
    device.seed_all(value)
    model_parallel_cuda_manual_seed(value)


def destroy_model_parallel() -> None:
    """Undo :func:`initialize`; the default process group stays.

    megatron-core only forgets its groups.  Over gloo each keeps a thread that wakes a hundred
    times a second: what one layout leaves behind slows all later ones of the process.
    """
    dist.barrier()  # a peer may still be in a collective of one of them
    mpu.destroy_model_parallel()
    for group in private_names.process_groups():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def derived_seed(*parts: object) -> int:
    """A seed below 2^31 for one purpose, named by ``parts`` (numbers and strings)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_dropout(value: int, iteration: int) -> None:
    """Seed all generators for one step's masks: a resumed run draws what an unbroken one would.

    Pipeline, data- and context-parallel ranks, which have other tokens or layers, get masks of
    their own; tensor-parallel ranks share the default generator, and megatron's tracker has one for
    each of them.
    """
    ranks = pipeline_rank(), data_parallel_rank(), context_parallel_rank()
    seed(derived_seed("dropout", value, iteration, *ranks))


def destroy() -> None:
    """Leave every process group."""
    destroy_model_parallel()
    dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks to the user."""
    return dist.get_rank() == 0


def tensor_parallel_group() -> dist.ProcessGroup:
    """The ranks that share each weight matrix."""
    return mpu.get_tensor_model_parallel_group()


def tensor_parallel_rank() -> int:
    """Rank within the tensor-parallel group."""
    return mpu.get_tensor_model_parallel_rank()


def tensor_parallel_size() -> int:
    """Size of the tensor-parallel group."""
    return mpu.get_tensor_model_parallel_world_size()


def expert_parallel_rank() -> int:
    """Rank among those that share out the experts."""
    return mpu.get_expert_model_parallel_rank()


def expert_parallel_size() -> int:
    """Ranks that share out the experts."""
    return mpu.get_expert_model_parallel_world_size()


def expert_tensor_parallel_rank() -> int:
    """Rank among those that share out the channels of one expert."""
    return mpu.get_expert_tensor_parallel_rank()


def pipeline_rank() -> int:
    """Pipeline stage of this process."""
    return mpu.get_pipeline_model_parallel_rank()


def pipeline_size() -> int:
    """Number of pipeline stages."""
    return mpu.get_pipeline_model_parallel_world_size()


def pipeline_ranks() -> list[int]:
    """Global ranks of the stages of this process's pipeline, first to last."""
    return dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())


def context_parallel_group() -> dist.ProcessGroup:
    """The ranks that share each sequence."""
    return mpu.get_context_parallel_group()


def context_parallel_rank() -> int:
    """Rank within the context-parallel group."""
    return mpu.get_context_parallel_rank()


def context_parallel_size() -> int:
    """Size of the context-parallel group."""
    return mpu.get_context_parallel_world_size()


def is_last_stage() -> bool:
    """Whether this process holds the output head (of its last virtual chunk)."""
    return mpu.is_pipeline_last_stage(ignore_virtual=True)


def data_parallel_rank() -> int:
    """Which share of the global batch this process works on."""
    return mpu.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Into how many shares the global batch is split."""
    return mpu.get_data_parallel_world_size()


def broadcast_from_last_stage(tensor: torch.Tensor) -> None:
    """In place: every model-parallel rank gets the last stage's tensor of its TP rank 0.

    So do all context-parallel ranks, which generate the same sequences: their first one's.
    """
    _spread(lambda source, group: dist.broadcast(tensor, src=source, group=group))


def share_object(value: Any) -> Any:
    """The picklable ``value`` of the rank that :func:`decides_for_model`, on all of its model's."""
    box = [value]
    _spread(lambda source, group: dist.broadcast_object_list(box, src=source, group=group))
    return box[0]


def _spread(broadcast: Callable[[int, dist.ProcessGroup], None]) -> None:
    if tensor_parallel_size() * pipeline_size() > 1:
        # Tensor-parallel ranks are neighbours in megatron's rank order.
        source = mpu.get_pipeline_model_parallel_last_rank() - tensor_parallel_rank()
        broadcast(source, mpu.get_model_parallel_group())
    if context_parallel_size() > 1:
        broadcast(mpu.get_context_parallel_global_ranks()[0], context_parallel_group())


def decides_for_model() -> bool:
    """Whether this process is the one of its copy of the model (TP x PP x CP) that speaks for it:

    the one whose tensor :func:`broadcast_from_last_stage` spreads.
    """
    return is_last_stage() and tensor_parallel_rank() == 0 and context_parallel_rank() == 0


def gather_over_pipeline(value: Any) -> list[Any]:
    """Every pipeline stage's picklable ``value``, first to last."""
    return gather_objects(value, mpu.get_pipeline_model_parallel_group())


def exchange_between_stages(
    sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Point to point in this process's pipeline: one flat tensor to, and from, each stage named.

    ``receives`` are filled and returned.  Both ends must name each other with the same size; a
    tensor without elements is not sent.
    """
    group = mpu.get_pipeline_model_parallel_group()
    operations = [
        dist.P2POp(function, tensor, group=group, group_peer=stage)
        for function, tensors in ((dist.isend, sends), (dist.irecv, receives))
        for stage, tensor in sorted(tensors.items())
        if tensor.numel()
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return receives


def sum_over_data_parallel(values: torch.Tensor) -> torch.Tensor:
    """In place: the sum over the data-parallel ranks."""
    if data_parallel_size() > 1:
        dist.all_reduce(values, group=mpu.get_data_parallel_group())
    return values


def gather_over_tensor_parallel(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor-parallel rank's ``tensor``, all of one shape, in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(tensor_parallel_size())]
    dist.all_gather(parts, tensor.contiguous(), group=tensor_parallel_group())
    return parts


def broadcast_from_stage(tensor: torch.Tensor, stage: int) -> None:
    """In place: every pipeline stage gets the tensor of ``stage``."""
    if pipeline_size() > 1:
        group = mpu.get_pipeline_model_parallel_group()
        dist.broadcast(tensor, src=pipeline_ranks()[stage], group=group)


def max_over_experts(value: int) -> int:
    """The largest ``value`` of the ranks whose tokens meet in the same experts; collective there.

    They go through a layer together or not at all.  ``value`` itself without expert parallelism.
    """
    if expert_parallel_size() == 1:
        return value
    return int(largest_over_experts(device.from_host(torch.tensor([value]))))


def largest_over_experts(numbers: torch.Tensor) -> torch.Tensor:
    """The same of a tensor, in place, on the device: the host does not wait for it."""
    if expert_parallel_size() > 1:
        group = mpu.get_expert_tensor_and_model_parallel_group()
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers


def gather_over_data_parallel(value: Any) -> list[Any]:
    """Every data-parallel rank's picklable ``value``, in rank order."""
    return gather_objects(value, mpu.get_data_parallel_group())


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """The maximum of each value over the world; every rank must call it."""
    return max_of_tensor(device.from_host(torch.tensor([float(v) for v in values])))


def max_of_tensor(values: torch.Tensor) -> list[float]:
    """As :func:`max_over_ranks`, of numbers [n] on the device, which it overwrites."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's picklable ``value``, in rank order (of the world where no group is given)."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's picklable ``value`` on every rank (of the world where no group is given)."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def local_share(items: Sequence[Any]) -> list[Any]:
    """This data-parallel rank's contiguous share of a global batch (its size divides)."""
    size = len(items) // data_parallel_size()
    assert size * data_parallel_size() == len(items), "global batch must divide over DP"
    return list(items[data_parallel_rank() * size :][:size])
