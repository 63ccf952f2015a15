"""What is said of ``--decode-cuda-graphs`` before anything runs.  No import of torch."""

from __future__ import annotations

from megatron_phf.config.settings import Config
from megatron_phf.model.architecture import Architecture

FLAG = "--decode-cuda-graphs"


def why_no_graphs(config: Config, arch: Architecture) -> str | None:
    """What of a run no CUDA graph can hold; None where one can."""
    if config.parallel.pipeline_model_parallel_size > 1:
        return "with --pipeline-model-parallel-size above 1 a stage waits for another's"
    if arch.experts is not None:
        return "how many tokens an expert gets decides what is launched"
    return None


def check_decoding(config: Config, arch: Architecture, gpus: int) -> None:
    """Raise ValueError where graphs are asked for and there can be none."""
    if config.rollout.decode_cuda_graphs == "on":
        why = why_no_graphs(config, arch) if gpus else "there is no GPU here"
        if why is not None:
            raise ValueError(f"{FLAG} on: {why}; use auto or off")
