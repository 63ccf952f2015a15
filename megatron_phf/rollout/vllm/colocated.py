"""Servers on the training GPUs: asleep while the models compute, awake while they sample."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_phf.config.settings import Config
from megatron_phf.rollout.vllm.control import Control, ServerGone
from megatron_phf.rollout.vllm.flags import syncs_adapters
from megatron_phf.rollout.vllm.server import VllmServer
from megatron_phf.rollout.vllm.sync import deadline
from megatron_phf.runtime import device
from megatron_phf.runtime.together import on_every_rank, on_first_rank


class Beds:
    """Where ``--vllm-colocated`` servers sleep; others never do.  Every rank calls each method.

    Raises:
        ValueError: a server does not do as it is told; on every rank.
    """

    def __init__(self, servers: list[VllmServer], config: Config) -> None:
        self._controls = [Control(server) for server in servers if config.vllm.vllm_colocated]
        self._config = config
        self.asleep = False
        # Weights that every step brings whole need not be kept meanwhile.
        self.forget = not syncs_adapters(config) and config.vllm.vllm_sync_interval == 1

    def sleep(self) -> None:
        """Leave the GPUs' memory to the models."""
        level = 2 if self.forget else 1

        def sleep(control: Control) -> None:
            if not control.is_asleep():
                control.sleep(level)

        self._each(sleep)
        self.asleep = bool(self._controls)

    def wake_weights(self) -> None:
        """Memory for the weights, which may then be brought."""
        self._wake("weights")

    def wake_cache(self) -> None:
        """Memory for keys and values: requests may come."""
        self._wake("kv_cache")
        self.asleep = False

    def _wake(self, what: str) -> None:
        if self._controls:  # every rank's cache is empty before a server takes memory
            on_every_rank(_give_back)

        def wake(control: Control) -> None:
            if control.is_asleep():
                control.wake(what)

        self._each(wake)

    def _each(self, action: Callable[[Control], None]) -> None:
        if self._controls:
            on_first_rank(self._tell, action, deadline(self._config))

    def _tell(self, action: Callable[[Control], None], until: float) -> None:
        for control in self._controls:
            _told(control, action, until)


def _give_back() -> None:
    """Give other processes what this one's allocator keeps of the device's memory unused."""
    device.synchronize()
    torch.cuda.empty_cache()


def _told(control: Control, action: Callable[[Control], None], until: float) -> None:
    """``action`` once it answers: one that was restarted is awake."""
    while True:
        try:
            action(control)
        except ServerGone:
            control.wait(until)
        else:
            return
