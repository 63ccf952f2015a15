"""CUDA graphs of a token's step: what the host launched once, the device launches again."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from megatron_phf.config.settings import Config
from megatron_phf.model.architecture import Architecture
from megatron_phf.rollout.megatron.flags import FLAG, why_no_graphs
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, parallel


def wants_graphs(config: Config, arch: Architecture) -> bool:
    """Whether ``--decode-cuda-graphs`` and this run's device and layout let steps be captured."""
    asked = config.rollout.decode_cuda_graphs != "off"
    return asked and device.has_cuda() and why_no_graphs(config, arch) is None


class StepGraphs:
    """Launches steps, as graphs where that is wanted and works.

    A step is captured the second time that it is launched since :meth:`forget`: the first time
    loads kernels and makes communicators, which a capture must not.
    """

    def __init__(self, wanted: bool, required: bool = False) -> None:
        """``required``: a capture that fails is an error, rather than a warning."""
        self._wanted, self._required = wanted, required
        self._launched = False
        self._replay: Callable[[], None] | None = None

    def forget(self) -> None:
        """The memory that a step reads or writes is another from now on."""
        self._launched, self._replay = False, None

    def captures(self, sampling: SamplingParams) -> bool:
        """Whether steps so sampled are captured, as far as is known."""
        return self._wanted and not _searches(sampling)

    def launch(self, step: Callable[[], None], sampling: SamplingParams) -> None:
        """Run ``step``, which launches the same each time, on the same memory."""
        if self._replay is None and self._launched and self.captures(sampling):
            self._capture(step)
        if self._replay is not None:
            self._replay()
        else:
            step()
        self._launched = True

    def _capture(self, step: Callable[[], None]) -> None:
        try:
            self._replay = device.captured(step)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self._required:
                raise ValueError(f"{FLAG} on: a step cannot be captured ({reason})") from error
            self._wanted = False
            if parallel.is_first_rank():
                warnings.warn(
                    f"{FLAG} auto: a step cannot be captured ({reason}); rollouts go on without",
                    stacklevel=2,
                )


def _searches(sampling: SamplingParams) -> bool:
    """Whether the nucleus is searched for: how often depends on the probabilities."""
    return sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p < 1
