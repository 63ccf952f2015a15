"""Whether models and rows have room for the rollouts of ``--replay-file``, by their own lengths.

Limits for what is sampled (``--max-prompt-length``, ``--max-new-tokens`` and others) say nothing of
a recorded rollout.  No import of torch.
"""

from __future__ import annotations

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_names
from megatron_phf.data.microbatches import round_up
from megatron_phf.data.rollouts import Rollout, read_rollouts
from megatron_phf.model.architecture import Architecture
from megatron_phf.teacher.architecture import Models


def check_replay(models: Models, config: Config) -> None:
    """Refuse a replay file that the job cannot train on; does nothing without one.

    Raises:
        ValueError: names the file and the rollout of the first mistake.
    """
    path = config.rollout.replay_file
    if path is None:
        return
    rollouts = read_rollouts(path, models.vocab_size, teacher_names(config))
    for number, rollout in enumerate(rollouts, start=1):
        name = f"--replay-file {path}: rollout {number}"
        _check_positions(rollout, models.student, models.teacher, name)
        _check_row(rollout, config, name)
        if config.method.importance_ratio_cap is not None and rollout.log_probs is None:
            raise ValueError(
                f"{name} has no log_probs of what sampled it, which --importance-ratio-cap needs; "
                "leave that out"
            )


def _check_positions(
    rollout: Rollout, student: Architecture, teacher: Architecture, name: str
) -> None:
    sides = (
        ("student", rollout.student_prompt_ids, student.max_position_embeddings),
        ("teacher", rollout.teacher_prompt_ids, teacher.max_position_embeddings),
    )
    for side, prompt, positions in sides:
        length = len(prompt) + len(rollout.response_ids)
        if length > positions:
            raise ValueError(
                f"{name} has {length} tokens for the {side}, whose positions end at {positions}; "
                "was it recorded with another model?"
            )


def _check_row(rollout: Rollout, config: Config, name: str) -> None:
    """A packed row holds the longest under context parallelism, and where rows have one length."""
    batching, parallel = config.batching, config.parallel
    cp = parallel.context_parallel_size
    fixed = parallel.tp_comm_overlap or (batching.pack_sequences and cp > 1)
    if not fixed:
        return
    prompt = max(len(rollout.student_prompt_ids), len(rollout.teacher_prompt_ids))
    length = round_up(prompt + len(rollout.response_ids), 2 * cp if cp > 1 else 1)
    budget = batching.max_tokens_per_microbatch
    if length > budget:
        padding = f", padded to a multiple of 2 x --context-parallel-size {cp}" if cp > 1 else ""
        raise ValueError(
            f"{name} has {length} tokens{padding}, which a row of --max-tokens-per-microbatch "
            f"{budget} must hold; raise it"
        )
