"""Teachers' weights in host memory, on the device only during their passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.nn import Parameter

from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.runtime import device

# Puts the weights of the teacher of that name into one of its model's chunks.
Switch = Callable[[FlowGPTModel, str], None]


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


class TakingTurns:
    """Weights of several models of one architecture: all on the host, one on the device.

    Every chunk of the model changes by itself: a pipeline's stages come to a teacher's first
    microbatch one after the other.  What was taken of the weights before (an output head) stays.
    """

    def __init__(
        self,
        chunks: list[FlowGPTModel],
        names: Sequence[str],
        load: Callable[[str], None],
        stay: bool,
    ) -> None:
        """``load`` fills ``chunks`` with a model's weights; collective.

        ``stay``: the last one's stay on the device between passes.
        """
        self._chunks, self._stay = chunks, stay
        self._host: dict[str, list[list[Tensor]]] = {}
        for name in names:
            load(name)
            self._host[name] = [[device.to_host(p.data) for p in c.parameters()] for c in chunks]
            for p in (p for chunk in chunks for p in chunk.parameters()):
                p.data = p.data.clone()  # on a CPU what is kept is the parameter's own memory
        self._there: list[str | None] = []
        self._leave()
        for chunk in chunks if stay else []:
            self._switch(chunk, names[0])

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Switch]:
        """Within, chunks are switched from one teacher to another."""
        try:
            yield self._switch
        finally:
            if not self._stay:
                self._leave()

    def _switch(self, chunk: FlowGPTModel, name: str) -> None:
        number = next(i for i, each in enumerate(self._chunks) if each is chunk)
        if self._there[number] != name:
            self._there[number] = name
            for p, kept in zip(chunk.parameters(), self._host[name][number], strict=True):
                p.data = kept  # first, so that never more than one model is there
                p.data = device.to_device(kept)

    def _leave(self) -> None:
        """Nothing stays on the device."""
        self._there = [None] * len(self._chunks)
        for chunk, weights in zip(self._chunks, next(iter(self._host.values())), strict=True):
            for p, kept in zip(chunk.parameters(), weights, strict=True):
                p.data = kept
