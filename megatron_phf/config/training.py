"""Settings of what is trained and how: adapters, optimizer, microbatches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.field import (
    ABOVE_0,
    FROM_0_TO_1,
    FROM_0_TO_BELOW_1,
    SEED,
    at_least,
    flag,
)


@dataclass(frozen=True)
class LoraConfig:
    lora_rank: int = flag(
        0,
        "train low-rank adapters of this rank alone; 0 trains all weights",
        at_least(0),
        needs="hf_model",
    )
    lora_alpha: float = flag(
        128.0,
        "the adapters' output is scaled by this / --lora-rank",
        ABOVE_0,
        acts_with="lora_rank",
    )
    lora_dropout: float = flag(
        0.0,
        "of the adapters' input, in the student's training pass",
        FROM_0_TO_BELOW_1,
        acts_with="lora_rank",
    )
    lora_target_modules: str = flag(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "linears with an adapter, by their HuggingFace names",
        acts_with="lora_rank",
    )
    lora_adapter: str | None = flag(
        None, "start from this PEFT adapter directory", needs="lora_rank"
    )
    save_adapter: str | None = flag(
        None, "export the trained adapters to this PEFT directory", needs="lora_rank"
    )


@dataclass(frozen=True)
class TrainConfig:
    train_iters: int = flag(100, "optimizer steps", at_least(1))
    global_batch_size: int = flag(32, "rollouts an optimizer step", at_least(1))
    micro_batch_size: int = flag(1, "rollouts a microbatch", at_least(1))
    lr: float = flag(5e-6, "peak learning rate", at_least(0))
    min_lr: float = flag(0.0, "final learning rate", at_least(0))
    lr_decay_style: str = flag(
        "cosine", "schedule", ("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = flag(
        None,
        "steps that the rate decays over (None: --train-iters, as a run began with it)",
        at_least(1),
    )
    lr_warmup_iters: int = flag(0, "linear warm-up steps", at_least(0))
    lr_warmup_fraction: float | None = flag(
        None,
        "warm-up as a fraction of --lr-decay-iters, in place of --lr-warmup-iters",
        FROM_0_TO_BELOW_1,
    )
    lr_wsd_decay_style: str = flag(
        "exponential",
        "how WSD (warm-up, stable, decay) ends",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = flag(
        None, "steps of that end, the last of --lr-decay-iters", at_least(1)
    )
    weight_decay: float = flag(0.0, "AdamW weight decay", at_least(0))
    adam_beta1: float = flag(0.9, "AdamW", FROM_0_TO_BELOW_1)
    adam_beta2: float = flag(0.999, "AdamW", FROM_0_TO_BELOW_1)
    adam_eps: float = flag(1e-8, "AdamW", ABOVE_0)
    clip_grad: float = flag(0.1, "global gradient norm at most; 0 is off", at_least(0))
    seed: int = flag(1234, "of the data order, the sampling and the initial weights", SEED)


@dataclass(frozen=True)
class BatchingConfig:
    max_tokens_per_microbatch: int = flag(
        0,
        "sort rollouts by length into microbatches of at most this many padded tokens of either "
        "model; 0: --micro-batch-size rollouts each",
        at_least(0),
    )
    pack_sequences: bool = flag(
        False,
        "with it: a microbatch's rollouts in one row (THD), without padding between them (with "
        "context parallelism, each padded to 2 x CP tokens)",
        needs="max_tokens_per_microbatch",
    )


@dataclass(frozen=True)
class CollapseConfig:
    """Thresholds of the signs of collapse (docs/operations.md); 0 switches one off."""

    stop_on_collapse: bool = flag(
        False, "end the run at a sign of collapse; the checkpoint before stays", needs="hf_model"
    )
    collapse_steps: int = flag(
        10, "steps of the run's first level and of the level now", at_least(1)
    )
    collapse_length: float = flag(
        0.5, "least response length, times the first; most is 1 / this", FROM_0_TO_BELOW_1
    )
    collapse_entropy: float = flag(
        0.1, "least entropy of the student, times the first; most is 1 / this", FROM_0_TO_BELOW_1
    )
    collapse_copying: float = flag(
        0.95, "most of the reference's words in the responses, share", FROM_0_TO_1
    )
    collapse_agreement: float = flag(
        0.3, "least share of tokens where teacher and student agree", FROM_0_TO_1
    )
