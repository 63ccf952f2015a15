"""TensorBoard and Weights & Biases: they show a run and never end it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.train.run_files import plain_config


class _TensorBoard:
    def __init__(self, config: Config, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board = os.path.join(config.output.output_dir, "tensorboard", config.output.run_name)
        self._writer = SummaryWriter(board, purge_step=done + 1 if done else None)

    def record(self, iteration: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, done: int) -> None:
        import wandb

        output = config.output
        self._run = wandb.init(
            project=output.wandb_project, name=output.run_name, config=plain_config(config)
        )

    def record(self, iteration: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=iteration)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """Those of one run, for one process.

    The first failure of one is said, whatever it is; what it misses from there on is counted.
    """

    def __init__(self, config: Config, done: int, say: Callable[[str], None]) -> None:
        """``done``: steps of a run that is resumed; ``say`` takes the warnings."""
        self._say = say
        wanted = {
            "TensorBoard": (_TensorBoard, config.output.tensorboard),
            "Weights & Biases": (_Wandb, config.output.wandb_project is not None),
        }
        self._open: dict[str, Any] = {}
        self._missed: dict[str, int] = {}
        for name, (make, on) in wanted.items():
            if on:
                self._open[name] = self._tried(name, partial(make, config, done))

    def _tried(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._missed[name] = 0
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"warning: {name} has failed and hears of no further step ({reason})")

    def record(self, iteration: int, scalars: dict[str, float]) -> None:
        """Show numbers of ``iteration``."""
        for name, tracker in self._open.items():
            if name not in self._missed:
                self._tried(name, partial(tracker.record, iteration, scalars))
            if name in self._missed:
                self._missed[name] += 1

    def close(self) -> None:
        """Send what is left; say what a tracker that has failed lacks."""
        for name, tracker in self._open.items():
            if name not in self._missed:
                self._tried(name, tracker.close)
        for name, count in self._missed.items():
            self._say(f"warning: {name} lacks {count} record(s); the run's own files have them")
