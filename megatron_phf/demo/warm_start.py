"""Supervised training on worked solutions: gives the embedded task's tiny model its language."""

from __future__ import annotations

import os
from collections import deque

from megatron_phf.config.settings import Config
from megatron_phf.data.prompts import PromptPair
from megatron_phf.rollout.context import Prompts
from megatron_phf.rollout.order import problem_permutation
from megatron_phf.train.hooks import RunHook, Stop
from megatron_phf.train.metrics import StepMetrics

_AVERAGED_STEPS = 10


class LossReached(RunHook):
    """The end of a run once the output loss, averaged over a few steps, is below a value.

    The task is learned suddenly: a fixed number of steps would start the methods from anywhere
    between chance and perfection, by the rounding of the machine.
    """

    def __init__(self, loss: float) -> None:
        self._loss, self.reached = loss, False
        self._recent: deque[float] = deque(maxlen=_AVERAGED_STEPS)

    def after_step(self, iteration: int, metrics: StepMetrics) -> Stop | None:
        """The same number on every rank."""
        self._recent.append(metrics.opsd)
        mean = sum(self._recent) / len(self._recent)
        self.reached = len(self._recent) == _AVERAGED_STEPS and mean < self._loss
        if not self.reached:
            return None
        return Stop(f"loss {mean:.3f} over {_AVERAGED_STEPS} steps", finished=True)


def warm_start_prompts(prompts: Prompts, seed: int) -> Prompts:
    """Each problem twice: its student's prompt and its teacher's, for the one model to know.

    They are where the first epoch of a run with this ``seed`` takes both into one batch.
    """
    pairs = [
        PromptPair(pair.problem, ids, ids)
        for pair in prompts.pairs
        for ids in (pair.student_ids, pair.teacher_ids)
    ]
    order = problem_permutation(len(pairs), seed, epoch=0)
    placed = [pairs[i] for i in order.argsort()]
    return Prompts(prompts.tokenizer, placed, prompts.stop_ids)


def warm_start_config(job: Config, model: str, target: str) -> Config:
    """Supervised fine-tuning of ``model``, exported to ``target``."""
    settings = job.embedded
    return job.replaced(
        hf_model=model,
        save_hf=target,
        output_dir=os.path.join(job.output.output_dir, "warm_start"),
        run_name="warm_start",
        rollout_engine="reference",
        opsd_objective="cross_entropy",
        opsd_temperature=1.0,
        opsd_top_k=0,
        phf_alpha=0.0,
        teacher="live",
        global_batch_size=2 * job.train.global_batch_size,
        lr=settings.warm_start_lr,
        train_iters=settings.warm_start_iters,
        lr_decay_iters=None,
        lr_warmup_iters=min(50, settings.warm_start_iters // 2),
        lr_warmup_fraction=None,
        clip_grad=1.0,
        max_new_tokens=128,  # whole solutions
        eval_data=None,
    )
