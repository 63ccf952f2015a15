"""Device memory of a simulated rank: live storages, who holds them, peaks by phase."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor

from megatron_phf.simulate.events import Events, call_site, short_name
from megatron_phf.simulate.torch_names import storage_key

_BLOCK = 512  # bytes that CUDA's caching allocator rounds to
_NAMED = 2**20  # bytes from which on an allocation's line is kept
# Who holds what is allocated under a function: (start of its file's name, of its own, holder).
# The innermost function that one fits decides; a holder in _BY_PHASE is a phase's own.
_RULES = (
    ("train/pipeline.py", "", "phase"),
    ("losses/", "", "output loss"),
    ("train/student_pass.py", "StudentPass._output_loss", "output loss"),
    ("hidden/", "", "flow"),
    ("train/teacher_pass.py", "", "flow"),
    ("rollout/megatron/cache.py", "", "KV cache"),
    ("teacher/", "", "teacher"),
    ("megatron/optimizer/", "", "optimizer"),
    ("megatron/distributed/param_and_grad_buffer.py", "", "gradients"),
    ("train/optimizer.py", "", "optimizer"),
)
_BY_PHASE = {
    "build": "weights", "teacher": "activations", "student": "activations",
    "optimizer": "optimizer", "teacher update": "teacher", "decode": "activations",
}  # fmt: skip
_FLOW_BY_PHASE = {"teacher": "targets"}


@dataclass
class _Block:
    size: int
    holder: str
    site: str
    token: object


class DeviceMemory:
    """Bytes of live device tensors.

    ``peaks``: by phase, the most bytes at a time, and ``held`` what each holder had of them;
    ``lines``: by phase, of its large allocations by (holder, line) then, within 0.3 %.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._live: dict[int, _Block] = {}
        self._holders: dict[CodeType, str | None] = {}
        self._now: Counter[str] = Counter()
        self._sites: Counter[tuple[str, str]] = Counter()
        self._named: dict[str, float] = {}
        self.bytes = self.peak = 0
        self.peaks: dict[str, int] = {}
        self.held: dict[str, dict[str, int]] = {}
        self.lines: dict[str, dict[tuple[str, str], int]] = {}

    def forget(self) -> None:
        """Peaks count from here on."""
        for table in (self.peaks, self.held, self.lines, self._named):
            table.clear()
        self.peak = 0

    def track(self, tensor: Any) -> None:
        """Count a device tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        old = self._live.get(key)
        if old is not None:
            if old.size == size:
                return
            self._free(key, old.token)
        token = object()
        weakref.finalize(storage, self._free, key, token).atexit = False
        site = call_site() if size >= _NAMED else ""
        self._add(key, _Block(size, self._holder(), site, token))

    def belongs_to(self, holder: str, tensors: Iterable[Tensor]) -> None:
        """From now on these tensors are held by ``holder``."""
        for tensor in tensors:
            if tensor.device.type != "cuda":
                continue
            block = self._live[storage_key(tensor.untyped_storage())]
            self._count(block, -1)
            block.holder = holder
            self._count(block, 1)

    def _add(self, key: int, block: _Block) -> None:
        self._live[key] = block
        self._count(block, 1)
        self.bytes += block.size
        phase = self._events.phase
        if self.bytes > self.peaks.get(phase, 0):
            self.peaks[phase], self.held[phase] = self.bytes, dict(self._now)
            if self.bytes > self._named.get(phase, 0.0):
                self._named[phase], self.lines[phase] = self.bytes * 1.003, dict(self._sites)
        self.peak = max(self.peak, self.bytes)

    def _count(self, block: _Block, sign: int) -> None:
        self._now[block.holder] += sign * block.size
        if block.site:
            self._sites[block.holder, block.site] += sign * block.size

    def _free(self, key: int, token: object) -> None:
        block = self._live.get(key)
        if block is not None and block.token is token:
            del self._live[key]
            self.bytes -= block.size
            self._count(block, -1)

    def _holder(self) -> str:
        phase, frame = self._events.phase, sys._getframe(2)
        found = None
        while frame is not None and found is None:
            found = self._rule(frame.f_code)
            frame = frame.f_back  # type: ignore[assignment]
        if found == "flow":
            return _FLOW_BY_PHASE.get(phase, "activations")
        if found is None or found == "phase":
            return _BY_PHASE.get(phase, "activations")
        return found

    def _rule(self, code: CodeType) -> str | None:
        if code not in self._holders:
            name, own = short_name(code.co_filename) or "", code.co_qualname
            fits = (h for file, f, h in _RULES if name.startswith(file) and own.startswith(f))
            self._holders[code] = next(fits, None)
        return self._holders[code]
