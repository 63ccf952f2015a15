"""What the user sees of a run: one line a step, a progress bar, metric files, TensorBoard, W&B."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from tqdm import tqdm

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import keep_lines
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.hooks import RunHook
from megatron_phf.train.metrics import StepMetrics
from megatron_phf.train.run_files import metrics_path, plain_config, step_of


def _line(iteration: int, total: int, values: dict[str, Any]) -> str:
    flow = "" if values["flow"] is None else f" | flow {values['flow']:.4f}"
    seconds = sum(values["seconds"].values())
    mode, fraction = values["clip_mode"], values["clipped_fraction"]
    clip = "no clip" if mode == "none" else f"{mode} clip {100 * fraction:.3g}%"
    mfu = "" if values.get("mfu") is None else f" | MFU {100 * values['mfu']:.1f}%"
    return (
        f"step {iteration:>{len(str(total))}}/{total} | loss {values['loss']:.5f}"
        f" | opsd {values['opsd']:.5f}{flow} | grad norm {values['grad_norm']:.3g}"
        f" | lr {values['learning_rate']:.2e} | {clip} | {values['rollout_tokens']} tokens"
        f" | {values['tokens_per_second']:.0f} tok/s{mfu} | {seconds:.2f} s"
    )


def say(text: str) -> None:
    """Print on rank 0 alone, above a progress bar if there is one."""
    if parallel.is_first_rank():
        tqdm.write(text)


class RunLogger(RunHook):
    """Records the steps of one run on rank 0; does nothing elsewhere."""

    def __init__(self, config: Config, done: int = 0, every: int = 1) -> None:
        """Every rank calls it.

        Args:
            done: steps of a run that is resumed; what was recorded after them goes.
            every: how many steps have a line together, the last of them.

        Raises:
            ValueError: a package is missing; on every rank.
        """
        self._active = parallel.is_first_rank()
        self._total, self._every = config.train.train_iters, every
        self._metrics: Any = None
        self._board: Any = None
        self._wandb: Any = None
        self._bar: Any = None
        on_first_rank(self._open, config, done)

    def _open(self, config: Config, done: int) -> None:
        output, name = config.output, config.output.run_name
        os.makedirs(output.output_dir, exist_ok=True)
        path = metrics_path(config)
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
        keep_lines(path, lambda number, line: 0 < step_of(line) <= done, lambda x: step_of(x) >= 0)
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = os.path.join(output.output_dir, "tensorboard", name)
            self._board = SummaryWriter(board, purge_step=done + 1 if done else None)
        if output.wandb_project is not None:
            self._wandb = _start_wandb(output.wandb_project, config, name)
        if output.progress:
            # disable=None: no bar in a file, where each refresh would be a line of its own
            self._bar = tqdm(
                total=self._total,
                initial=done,
                desc=name,
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
            tqdm.write(_line(iteration, self._total, values))
        self._metrics.write(json.dumps(_finite(values)) + "\n")
        self._metrics.flush()
        self._record(iteration, _scalars(values))
        if self._bar is not None:
            self._bar.update(1)

    def evaluation(self, iteration: int, values: dict[str, float]) -> None:
        """Record an evaluation after ``iteration`` steps beside their metrics."""
        self._record(iteration, {f"evaluation/{name}": v for name, v in values.items()})

    def _record(self, iteration: int, scalars: dict[str, float]) -> None:
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, iteration)
        if self._wandb is not None:
            self._wandb.log(scalars, step=iteration)

    def close(self) -> None:
        """Flush everything."""
        for sink in (self._metrics, self._board, self._bar):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(value: Any) -> Any:
    """NaN and infinity become null: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def _start_wandb(project: str, config: Config, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--wandb-project needs the package wandb: pip install wandb") from error
    return wandb.init(project=project, name=name, config=plain_config(config))
