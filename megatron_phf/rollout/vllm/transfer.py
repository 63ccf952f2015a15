"""The student's weights to vLLM servers over its weight-transfer API, without a disk.

A few tensors at a time, whole and under HuggingFace's names, from the ranks that share them out; no
rank ever holds a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.protocol import WeightsLost
from megatron_phf.rollout.vllm.control import Control, ServerGone
from megatron_phf.rollout.vllm.http import TransientError
from megatron_phf.rollout.vllm.server import VllmServer
from megatron_phf.rollout.vllm.sync import ServedModels, deadline
from megatron_phf.rollout.vllm.ways import MESSAGE_BYTES, WAYS, Named
from megatron_phf.runtime import device, parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.weights.huggingface import export_with_head


def messages(weights: Iterable[tuple[str, Tensor]], most: int) -> Iterator[Named]:
    """``weights`` in order, together as long as they have ``most`` bytes, or one that has more."""
    together: list[tuple[str, Tensor]] = []
    for pair in weights:
        if together and sum(t.nbytes for _, t in together) + pair[1].nbytes > most:
            yield together
            together = []
        together.append(pair)
    if together:
        yield together


@dataclass
class Link:
    """A way to a server's workers, and what they were last given over it."""

    workers: Any
    version: str | None = None


class WeightTransfer(ServedModels):
    """Sends the student's weights to all servers (see ``WeightSync``)."""

    def __init__(
        self,
        servers: list[VllmServer],
        student: list[FlowGPTModel],
        arch: Architecture,
        config: Config,
    ) -> None:
        super().__init__(servers, student, arch, config)
        self._way = WAYS[config.vllm.vllm_weight_sync](config.vllm.vllm_timeout_seconds)
        self._controls = [Control(server) for server in servers]
        self._links: dict[Control, Link] = {}  # of rank 0
        # With one step ahead nothing is under way while weights come.
        self._pause = "keep" if config.rollout.max_off_policy_steps > 1 else "wait"

    def push(self, version: int) -> None:
        """Let every server sample with the student's weights from now on.  Every rank calls.

        A server that dies meanwhile is waited for, and gets all of them again.

        Raises:
            ValueError: a server refuses them, or does not come back; on every rank.
        """
        name = f"{self._prefix}-{version}"
        until, missing = deadline(self._config), self._controls
        for _ in range(1 + self._config.vllm.vllm_max_retries):
            attempt = None
            if parallel.is_first_rank():
                attempt = _Round(missing, self._links, self._way, self._pause)
            self._send(attempt, name)
            gone = on_first_rank(_settled, attempt, until)
            if not gone:
                return
            missing = [control for control in self._controls if control.server.url in gone]
        raise ValueError(
            f"--vllm-url {gone[0]}: the server dies at every attempt to send it weights (see its "
            "log)"
        )

    def _send(self, attempt: _Round | None, version: str) -> None:
        if attempt is not None:
            attempt.begin()
        weights = export_with_head(self._student, self._arch, self._config)
        for tensors in messages(weights, MESSAGE_BYTES):
            said = self._way.message(tensors)
            if attempt is not None:
                attempt.send(said, tensors)
            if self._way.on_every_rank:  # a worker reads this rank's memory until then
                parallel.broadcast_object(None)
        if attempt is not None:
            attempt.end(version)

    def told(self, server: VllmServer) -> int | None:
        """See ``ServedModels``.

        Raises:
            WeightsLost: it was started anew since the last push, and would sample another model.
        """
        try:
            told = Control(server).version() or ""
        except ServerGone as error:
            raise TransientError(str(error)) from error
        name, _, version = told.rpartition("-")
        if name != self._prefix:
            raise WeightsLost(f"--vllm-url {server.url}: it was restarted (see its log)")
        return int(version)


def _settled(attempt: _Round | None, until: float) -> list[str]:
    assert attempt is not None, "rank 0 has one"
    return attempt.settle(until)


class _Round:
    """One attempt to bring all weights to some servers, on rank 0; failures are kept, not raised.

    The others wait for rank 0 in the export: it goes on whatever a server says.
    """

    def __init__(
        self, controls: list[Control], links: dict[Control, Link], way: Any, pause: str = "wait"
    ) -> None:
        """``pause``: what becomes of requests under way (see ``Control.begin_update``)."""
        self._open, self._links, self._way, self._pause = list(controls), links, way, pause
        self._gone: list[Control] = []
        self._refused: str | None = None

    def begin(self) -> None:
        """Connect to servers that are new, or were started anew; open the update."""

        def begin(control: Control) -> None:
            link = self._links.get(control)
            if link is None or link.version != control.version():
                self._links[control] = Link(self._way.connect(control, control.workers()))
            control.begin_update(self._pause)

        self._each(begin)

    def send(self, said: dict[str, Any], tensors: Named) -> None:
        """One message to all servers that are still there."""

        def send(control: Control) -> None:
            self._way.send(self._links[control].workers, tensors, lambda: control.update(said))

        self._each(send)

    def end(self, version: str) -> None:
        """Close the updates."""

        def end(control: Control) -> None:
            control.end_update(version)
            self._links[control].version = version

        self._each(end)

    def _each(self, action: Callable[[Control], None]) -> None:
        """``action`` for all open servers at once."""
        if self._refused is not None or not self._open:
            return

        def tried(control: Control) -> None:
            try:
                action(control)
            except (ServerGone, RuntimeError):  # gloo's: the connection has ended
                self._gone.append(control)
            except ValueError as error:
                self._refused = self._refused or str(error)

        with ThreadPoolExecutor(len(self._open)) as pool:
            list(pool.map(device.in_thread(tried), self._open))
        self._open = [control for control in self._open if control not in self._gone]

    def settle(self, until: float) -> list[str]:
        """URLs of the servers that have died and are back.

        Raises:
            ValueError: one refuses what it was sent, or does not come back.
        """
        if self._refused is not None:
            raise ValueError(self._refused)
        for control in self._gone:
            self._links.pop(control, None)
            control.wait(until)
        return [control.server.url for control in self._gone]
