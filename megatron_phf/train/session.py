"""A run from its start or its checkpoint to its end: resume, save, stop, on all ranks alike."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from types import MappingProxyType

from megatron_phf.config.settings import Config
from megatron_phf.rollout.ahead import AheadSource
from megatron_phf.runtime import parallel
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.runtime.signals import StopSignals
from megatron_phf.train.checkpoint import Checkpointer, Progress, Sampled
from megatron_phf.train.collapse import CollapseSigns
from megatron_phf.train.hooks import RunHook, Stop
from megatron_phf.train.logging import say
from megatron_phf.train.metrics import StepMetrics
from megatron_phf.train.step import Distiller


class Checkpoints(RunHook):
    """Those of one run: every ``--save-interval`` steps, and behind its last."""

    def __init__(
        self,
        config: Config,
        distiller: Distiller,
        heartbeat: Heartbeat,
        signs: CollapseSigns,
        ahead: AheadSource | None = None,
        rendering: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Of ``distiller``.

        Args:
            signs: once one has fired, the checkpoint before is the last.
            ahead: what samples for steps to come.
            rendering: how this run makes prompts.
        """
        self._settings, self._distiller = config.checkpoint, distiller
        self._heartbeat, self._signs, self._ahead = heartbeat, signs, ahead
        used = self._settings.save is not None or self._settings.load is not None
        self._checkpoints = Checkpointer(config, distiller, rendering) if used else None
        self._saved = 0

    def resume(self) -> int:
        """From the newest checkpoint of ``--load`` where there is one; steps done so far."""
        progress = Progress()
        if self._checkpoints is not None and self._settings.load is not None:
            progress = self._checkpoints.resume()
            self._restore(self._checkpoints.sampled)
        self._distiller.nonfinite.total = progress.nonfinite_steps
        self._distiller.nonfinite.in_a_row = progress.nonfinite_in_a_row
        self._signs.load_state(progress.collapse)
        self._saved = progress.iteration
        return progress.iteration

    def _restore(self, sampled: Sampled) -> None:
        taken = [] if self._ahead is None else self._ahead.restore(sampled)
        for step in sampled:
            how = "are in the checkpoint" if step in taken else "are too old and sampled again"
            say(f"rollouts of step {step} {how} (--max-off-policy-steps)")

    def after_step(self, iteration: int, metrics: StepMetrics) -> None:
        """Save where it is time to."""
        self._heartbeat.at(f"step {iteration}, save")
        interval = self._settings.save_interval
        if interval and iteration % interval == 0:
            self._save(iteration)

    def at_end(self, iteration: int, stopped: bool) -> None:
        """The last save, and wait for it."""
        self._save(iteration)
        if self._checkpoints is not None:
            self._checkpoints.finish()

    def _save(self, iteration: int) -> None:
        if self._checkpoints is None or self._settings.save is None or iteration <= self._saved:
            return
        if self._signs.fired is not None:
            kept = f"that of step {self._saved} stays" if self._saved else "there was none before"
            say(f"--save {self._settings.save}: no checkpoint of a collapsed student; {kept}")
            self._saved = iteration  # said once
            return
        nonfinite = self._distiller.nonfinite
        sampled = {} if self._ahead is None else self._ahead.sampled()
        counts = nonfinite.total, nonfinite.in_a_row
        progress = Progress(iteration, *counts, self._signs.state())
        self._checkpoints.save(progress, sampled)
        self._saved = iteration


class EndOfRun(RunHook):
    """The reasons to end before the last step: a signal, and the ``--exit`` flags."""

    def __init__(self, config: Config, signals: StopSignals) -> None:
        self._settings, self._signals = config.checkpoint, signals
        minutes = self._settings.exit_duration_in_mins
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def after_step(self, iteration: int, metrics: StepMetrics) -> Stop | None:
        """Every rank calls it: one small all-reduce."""
        late = self._end is not None and time.monotonic() >= self._end
        received, late_anywhere = parallel.max_over_ranks([self._signals.received or 0, late])
        if received:
            return Stop(f"{signal.Signals(int(received)).name} received")
        if late_anywhere:
            return Stop(
                f"--exit-duration-in-mins {self._settings.exit_duration_in_mins} has passed"
            )
        interval = self._settings.exit_interval
        if interval and iteration % interval == 0:
            return Stop(f"--exit-interval {interval}")
        return None
