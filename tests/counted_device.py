"""A device that is none: copies by ``device.to_device`` are counted for as long as they live."""

from __future__ import annotations

import weakref

import torch

from megatron_phf.runtime import device


class CountedDevice:
    """Stands in for the two functions of ``runtime.device`` that move an offloaded teacher.

    A copy's memory belongs to a numpy array, which lives exactly as long as any tensor that uses
    the memory: a tensor object itself says nothing, as parameters take over its memory.
    """

    def __init__(self) -> None:
        self._arrays: list[weakref.ref] = []
        self.most = 0

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, not counted."""
        return tensor.clone()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, counted."""
        array = tensor.detach().numpy().copy()
        self._arrays.append(weakref.ref(array))
        self.most = max(self.most, self.alive())
        return torch.from_numpy(array)

    def alive(self) -> int:
        """Copies whose memory is still in use."""
        self._arrays = [ref for ref in self._arrays if ref() is not None]
        return len(self._arrays)

    def install(self, setattr_=setattr) -> None:
        """Take the functions' place (with pytest: ``monkeypatch.setattr``)."""
        for name in ("to_host", "to_device"):
            setattr_(device, name, getattr(self, name))
