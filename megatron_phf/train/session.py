"""A run from its start or its checkpoint to its end: resume, save, stop, on all ranks alike."""

from __future__ import annotations

import signal
import time

from megatron_phf.config.settings import Config
from megatron_phf.runtime import parallel
from megatron_phf.runtime.signals import StopSignals
from megatron_phf.train.checkpoint import Checkpointer, Progress
from megatron_phf.train.logging import say
from megatron_phf.train.step import Distiller


class Session:
    """Checkpoints of one run, and the reasons to end it before its last step."""

    def __init__(self, config: Config, distiller: Distiller, signals: StopSignals) -> None:
        self._settings, self._signals = config.checkpoint, signals
        self._distiller, self._total = distiller, config.train.train_iters
        minutes = self._settings.exit_duration_in_mins
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        used = self._settings.save is not None or self._settings.load is not None
        self._checkpoints = Checkpointer(config, distiller) if used else None
        self._saved = 0
        self.stopped = False

    def begin(self) -> int:
        """Resume where asked; steps done so far.  Signals wait for the end of a step from here."""
        progress = Progress()
        if self._checkpoints is not None and self._settings.load is not None:
            progress = self._checkpoints.resume()
        self._distiller.nonfinite.total = progress.nonfinite_steps
        self._distiller.nonfinite.in_a_row = progress.nonfinite_in_a_row
        self._saved = progress.iteration
        self._signals.install()
        return progress.iteration

    def goes_on(self, iteration: int) -> bool:
        """After step ``iteration``: save where it is time to; whether another step follows."""
        reason = self._reason_to_stop(iteration)
        interval = self._settings.save_interval
        if reason is not None or (interval and iteration % interval == 0):
            self._save(iteration)
        if reason is not None:
            say(f"{reason}: ending after step {iteration}")
        self.stopped = reason is not None
        return not self.stopped

    def end(self, iteration: int) -> None:
        """After the last step of this process: the last save, and wait for it."""
        if iteration == self._total:
            self._save(iteration)
        if self._checkpoints is not None:
            self._checkpoints.finish()

    def _save(self, iteration: int) -> None:
        if self._checkpoints is None or self._settings.save is None or iteration <= self._saved:
            return
        nonfinite = self._distiller.nonfinite
        self._checkpoints.save(Progress(iteration, nonfinite.total, nonfinite.in_a_row))
        self._saved = iteration

    def _reason_to_stop(self, iteration: int) -> str | None:
        """Every rank calls it: one small all-reduce."""
        late = self._end is not None and time.monotonic() >= self._end
        received, late_anywhere = parallel.max_over_ranks([self._signals.received or 0, late])
        if received:
            return f"{signal.Signals(int(received)).name} received"
        if late_anywhere:
            return f"--exit-duration-in-mins {self._settings.exit_duration_in_mins} has passed"
        interval = self._settings.exit_interval
        if interval and iteration % interval == 0:
            return f"--exit-interval {interval}"
        return None
