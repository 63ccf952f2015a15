"""A teacher's weights in host memory, on the device only during its passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn import Parameter

from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.runtime import device


class HostWeights:
    """Keeps the parameters of ``chunks`` on the host (pinned on CUDA), from now on.

    Outside of :meth:`on_device` a parameter *is* its host tensor, so that averages, checkpoints and
    exports read and write it there.  On a CPU both places are one, and nothing is copied.
    """

    def __init__(self, chunks: list[FlowGPTModel]) -> None:
        self._parameters: list[Parameter] = [p for chunk in chunks for p in chunk.parameters()]
        for p in self._parameters:
            p.data = device.to_host(p.data)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Copies of the weights on the device within; dropped after, nothing is written back."""
        host = [p.data for p in self._parameters]
        try:
            for p in self._parameters:
                p.data = device.to_device(p.data)
            yield
        finally:
            for p, data in zip(self._parameters, host, strict=True):
                p.data = data
