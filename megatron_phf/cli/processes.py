"""How many processes a job takes, and whether sizes and batches divide into them.

No import of torch.
"""

from __future__ import annotations

import dataclasses
import os

from megatron_phf.config.settings import Config


def model_parallel_size(config: Config) -> int:
    """Processes that hold one copy of the model."""
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def check_world_size(config: Config, world_size: int) -> None:
    """Raise ValueError where processes, model-parallel sizes and batch sizes do not fit."""
    parallel, train = config.parallel, config.train
    model_parallel = model_parallel_size(config)
    if world_size % model_parallel:
        raise ValueError(
            f"{world_size} process(es) do not divide into models of "
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} x "
            f"--context-parallel-size {parallel.context_parallel_size}; start a "
            f"multiple of {model_parallel} (torchrun --nproc-per-node)"
        )
    replicas = world_size // model_parallel
    experts, cut = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    sharers = replicas * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    if sharers % (experts * cut):
        raise ValueError(
            f"--expert-model-parallel-size {experts} does not divide the {replicas} data-parallel "
            f"rank(s) of {world_size} process(es); start a multiple of {model_parallel * experts}"
        )
    if config.batching.max_tokens_per_microbatch:
        train = dataclasses.replace(
            train, micro_batch_size=1
        )  # any number of them may be asked for
    if train.global_batch_size % (replicas * train.micro_batch_size):
        raise ValueError(
            f"--global-batch-size {train.global_batch_size} is not a multiple of "
            f"--micro-batch-size {train.micro_batch_size} x {replicas} data-parallel rank(s)"
        )
    microbatches = train.global_batch_size // (replicas * train.micro_batch_size)
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and microbatches % stages:
        raise ValueError(
            f"{microbatches} microbatch(es) a step: virtual stages need a multiple of "
            f"--pipeline-model-parallel-size {stages}; change --global-batch-size"
        )


def process_count(config: Config, num_gpus: int) -> int:
    """Processes for one machine: a GPU each, else two on the CPU; whole models in any case."""
    model_parallel = model_parallel_size(config)
    wanted = max(num_gpus or 2, model_parallel)
    return wanted - wanted % model_parallel


def thread_count(processes: int) -> int:
    """Threads a process, so that the processes of this machine share its cores."""
    return max(1, (os.cpu_count() or 1) // processes)
