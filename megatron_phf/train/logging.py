"""What the user sees of a run: one line a step, a progress bar, metric files, TensorBoard, W&B."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from tqdm import tqdm

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import keep_lines
from megatron_phf.files.appended import AppendedLines
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.hooks import RunHook
from megatron_phf.train.metrics import StepMetrics
from megatron_phf.train.run_files import metrics_path, step_of
from megatron_phf.train.trackers import Trackers


def _line(iteration: int, total: int, values: dict[str, Any]) -> str:
    flow = "" if values["flow"] is None else f" | flow {values['flow']:.4f}"
    seconds = sum(values["seconds"].values())
    mode, fraction = values["clip_mode"], values["clipped_fraction"]
    clip = "no clip" if mode == "none" else f"{mode} clip {100 * fraction:.3g}%"
    mfu = "" if values.get("mfu") is None else f" | MFU {100 * values['mfu']:.1f}%"
    step = f"step {iteration:>{len(str(total))}}/{total}"
    if not values["rollout_tokens"]:
        return f"{step} | no rollout to train on: weights unchanged | {seconds:.2f} s"
    return (
        f"{step} | loss {values['loss']:.5f}"
        f" | opsd {values['opsd']:.5f}{flow} | grad norm {values['grad_norm']:.3g}"
        f" | lr {values['learning_rate']:.2e} | {clip} | {values['rollout_tokens']} tokens"
        f" | {values['tokens_per_second']:.0f} tok/s{mfu} | {seconds:.2f} s"
    )


def say(text: str) -> None:
    """Print on rank 0 alone, above a progress bar if there is one.

    A log that takes no more, on a full disk or in a closed pipe, ends no run.
    """
    if parallel.is_first_rank():
        with contextlib.suppress(OSError):
            tqdm.write(text)


class RunLogger(RunHook):
    """Records the steps of one run on rank 0; does nothing elsewhere."""

    def __init__(self, config: Config, done: int = 0, every: int = 1) -> None:
        """Every rank calls it.

        Args:
            done: steps of a run that is resumed; what was recorded after them goes.
            every: how many steps have a line together, the last of them.
        """
        self._active = parallel.is_first_rank()
        self._total, self._every = config.train.train_iters, every
        self._bar: Any = None
        self._lines = AppendedLines(metrics_path(config), "metrics")
        on_first_rank(self._open, config, done)

    def _open(self, config: Config, done: int) -> None:
        output, path = config.output, metrics_path(config)
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
        keep_lines(path, lambda number, line: 0 < step_of(line) <= done, lambda x: step_of(x) >= 0)
        self._trackers = Trackers(config, done, say)
        if output.progress:
            # disable=None: no bar in a file, where each refresh would be a line of its own
            self._bar = tqdm(
                total=self._total,
                initial=done,
                desc=output.run_name,
                unit="step",
                dynamic_ncols=True,
                disable=None,
            )

    def after_step(self, iteration: int, metrics: StepMetrics) -> None:
        """Record one step."""
        if not self._active:
            return
        values = {"step": iteration, **metrics.as_json()}
        if iteration % self._every == 0 or iteration == self._total:
            say(_line(iteration, self._total, values))
        if warning := self._lines.add([values]):
            say(warning)
        self._trackers.record(iteration, _scalars(values))
        if self._bar is not None:
            self._bar.update(1)

    def evaluation(self, iteration: int, values: dict[str, float]) -> None:
        """Record an evaluation after ``iteration`` steps beside their metrics."""
        if self._active:
            scalars = {f"evaluation/{name}": v for name, v in values.items()}
            self._trackers.record(iteration, scalars)

    def at_end(self, iteration: int, stopped: bool) -> str | None:
        """Lines that the disk has not taken in the end are an error, once all else is saved."""
        return on_first_rank(self._lines.last_problem)

    def close(self) -> None:
        """Flush everything."""
        if self._active:
            self._lines.add([])
            self._trackers.close()
        if self._bar is not None:
            self._bar.close()


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": v for name, v in value.items() if v is not None}
        elif isinstance(value, list):
            flat |= {f"{key}/{i + 1:03d}": v for i, v in enumerate(value)}
        elif isinstance(value, int | float) and key != "step":
            flat[key] = value
    return flat
