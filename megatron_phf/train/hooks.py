"""What happens around the steps of a run: each thing a hook, in the order of one list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_phf.train.metrics import StepMetrics


@dataclass(frozen=True)
class Stop:
    """Why no further step follows.

    ``finished``: the run has come to its end, and is exported; else another process goes on later.
    """

    reason: str
    finished: bool = False


class RunHook:
    """Called around the steps, on every rank in the same order; this one does nothing."""

    def before_step(self, iteration: int) -> None:
        """Before the rollouts of step ``iteration`` (1-based)."""

    def after_step(self, iteration: int, metrics: StepMetrics) -> Stop | None:
        """After the step; a reason to take no other, which the hooks behind still hear of."""

    def at_end(self, iteration: int, stopped: bool) -> str | None:
        """After the last step of this process; ``stopped``: another is to go on from there.

        Returns:
            A problem that the job ends with, once all hooks have done their part.
        """

    def close(self) -> None:
        """At the end, whatever has happened."""
