"""What is said of a step's rollouts before launch: how many, how old, which count.  No torch."""

from __future__ import annotations

from megatron_phf.config.settings import Config
from megatron_phf.rollout.engines import FLAG, engine_row


def check_rollouts(config: Config) -> None:
    """Raise ValueError where the rollouts' flags do not fit each other or the engine."""
    _check_off_policy(config)
    _check_groups(config)
    _check_importance(config)
    rollout = config.rollout
    samples = engine_row(rollout.rollout_engine).samples and not config.is_embedded
    if rollout.keep_rollouts != "all" and not samples:
        raise ValueError(
            f"--keep-rollouts {rollout.keep_rollouts} needs --data with answers and an engine that "
            f"samples, not {'the embedded task' if config.is_embedded else rollout.rollout_engine}"
        )


def _check_off_policy(config: Config) -> None:
    steps, spec = config.rollout.max_off_policy_steps, config.rollout.rollout_engine
    if steps and not engine_row(spec).beside:
        why = (
            "samples in the process that trains" if engine_row(spec).samples else "samples nothing"
        )
        raise ValueError(
            f"--max-off-policy-steps {steps}: {FLAG} {spec} {why}, and cannot while a step trains; "
            "use vllm or an engine of your own with sampler (docs/engines.md), or leave it out"
        )
    if steps and config.vllm.vllm_sync_interval > 1:
        raise ValueError(
            f"--vllm-sync-interval {config.vllm.vllm_sync_interval} makes rollouts older than "
            f"--max-off-policy-steps {steps} says; leave one of the two out"
        )


def _check_groups(config: Config) -> None:
    group, batch = config.rollout.rollouts_per_problem, config.train.global_batch_size
    if batch % group:
        raise ValueError(
            f"--global-batch-size {batch} is not a multiple of --rollouts-per-problem {group}"
        )
    spec = config.rollout.rollout_engine
    if group > 1 and not engine_row(spec).samples:
        raise ValueError(
            f"--rollouts-per-problem {group} needs an engine that samples, not {FLAG} {spec}"
        )


def _check_importance(config: Config) -> None:
    cap, spec = config.method.importance_ratio_cap, config.rollout.rollout_engine
    if cap is not None and spec in ("megatron", "reference"):
        raise ValueError(
            f"--importance-ratio-cap needs the log-probabilities of what sampled, which {FLAG} "
            f"{spec} does not give; use vllm, an engine of your own or a replay file that has them"
        )
