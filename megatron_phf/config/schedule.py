"""Flags of the learning rate, spelt and meant as Megatron-LM's: what does not fit together.

No import of torch.
"""

from __future__ import annotations

from megatron_phf.config.settings import Config, TrainConfig


def decay_iters(train: TrainConfig) -> int:
    """Steps that the learning rate decays over: --lr-decay-iters, or all."""
    return train.train_iters if train.lr_decay_iters is None else train.lr_decay_iters


def check_schedule(config: Config) -> None:
    """Raise ValueError for a schedule that does not exist, or that Megatron-LM would not start."""
    train = config.train
    if train.min_lr > train.lr:
        raise ValueError(f"--min-lr {train.min_lr}: need 0 to --lr")
    warmup, wsd = train.lr_warmup_iters, train.lr_wsd_decay_iters
    decay = f"--lr-decay-iters {train.lr_decay_iters}"
    if train.lr_decay_iters is None:
        decay = f"--train-iters {train.train_iters}, or give --lr-decay-iters"
    if train.lr_warmup_fraction is not None and warmup:
        raise ValueError("--lr-warmup-fraction and --lr-warmup-iters: give one of the two")
    # The embedded task's own warm-up is cut short with its steps.
    own = config.is_embedded and train.lr_decay_iters is None
    if warmup >= decay_iters(train) and not own:
        raise ValueError(f"--lr-warmup-iters {warmup}: need less than {decay}")
    if (train.lr_decay_style == "WSD") != (wsd is not None):
        raise ValueError("--lr-decay-style WSD and --lr-wsd-decay-iters belong together")
    if wsd is not None and wsd > decay_iters(train):
        raise ValueError(f"--lr-wsd-decay-iters {wsd}: need at most {decay}")
