"""CUDA out of memory: which flags to change, and a snapshot of what was allocated."""

from __future__ import annotations

import os

from megatron_phf.config.settings import Config
from megatron_phf.rollout.engines import engine_row
from megatron_phf.runtime import device
from megatron_phf.teacher.traits import traits_of


def _layout_advice(config: Config) -> list[str]:
    p, advice = config.parallel, []
    if not p.use_distributed_optimizer and not config.lora.lora_rank:
        advice.append("--use-distributed-optimizer: moments and fp32 weights shared out over DP")
    if p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        advice.append("--sequence-parallel: activations of norms shared out over TP")
    if not config.lora.lora_rank:
        advice.append("--lora-rank 64: no gradients and moments of whole weights")
    advice.append(
        f"--tensor-model-parallel-size {2 * p.tensor_model_parallel_size}, or a larger "
        "--pipeline-model-parallel-size"
    )
    return advice


def advice(config: Config, phase: str) -> list[str]:
    """What lowers the memory of ``phase`` (rollout, teacher, student, optimizer), best first.

    Only flags that the run does not use to their end already.
    """
    p, m, t = config.parallel, config.method, config.train
    lines = []
    if phase == "rollout" and engine_row(config.rollout.rollout_engine).in_process:
        size = config.rollout.rollout_batch_size
        if size > 1:
            lines.append(f"--rollout-batch-size {size // 2}: half the KV cache")
        lines.append("--rollout-engine vllm: rollouts on other GPUs")
    elif phase in ("student", "teacher", "optimizer"):
        budget = config.batching.max_tokens_per_microbatch
        if budget > 1024:
            lines.append(f"--max-tokens-per-microbatch {budget // 2}: half the activations")
        if t.micro_batch_size > 1:
            lines.append(f"--micro-batch-size {t.micro_batch_size // 2}: half the activations")
        if p.recompute_granularity != "full" and phase == "student":
            lines.append("--recompute-granularity full: a layer's input instead of activations")
        if m.logits_chunk_tokens > 64:
            lines.append(f"--logits-chunk-tokens {m.logits_chunk_tokens // 2}: fewer logits")
    own = traits_of(config).copy and not config.lora.lora_rank
    if own and not config.teacher.teacher_offload:
        lines.append("--teacher-offload: the teacher's weights on the host between its passes")
    if config.rollout.max_new_tokens > 256:
        lines.append(f"--max-new-tokens {config.rollout.max_new_tokens // 2}: shorter sequences")
    return lines + _layout_advice(config)


def report(error: Exception, config: Config, phase: str, rank: int) -> str:
    """The message of a rank whose device memory ran out; writes the snapshot.

    ``phase``: where it was, as the heartbeat has it ("step 3, student").
    """
    path = os.path.join(config.output.output_dir, f"out_of_memory_rank{rank}.pickle")
    lines = [f"rank {rank}: out of device memory ({phase}): {error}"]
    try:
        os.makedirs(config.output.output_dir, exist_ok=True)
        device.dump_memory_snapshot(path)
        lines.append(f"snapshot for https://pytorch.org/memory_viz: {path}")
    except (OSError, RuntimeError) as reason:
        lines.append(f"no snapshot: {reason}")
    lines.append("what lowers it:")
    lines += [f"  {line}" for line in advice(config, phase.rpartition(", ")[2])]
    return "\n".join(lines)
