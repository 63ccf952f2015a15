"""The endpoints by which a trainer steers a vLLM server: pause, weights, sleep.

As vLLM 0.32 has them (VLLM_SERVER_DEV_MODE=1): ``/pause``, ``/resume``, ``/get_world_size``,
``/init_weight_transfer_engine``, ``/start_weight_update``, ``/update_weights``,
``/finish_weight_update``, ``/weight_info``, ``/sleep``, ``/wake_up``, ``/is_sleeping``,
``/server_info``.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_phf.files.foreign import shown
from megatron_phf.rollout.vllm.http import StatusError, TransientError
from megatron_phf.rollout.vllm.server import VllmServer

_MODE = "; start the server with VLLM_SERVER_DEV_MODE=1"


class ServerGone(Exception):
    """A server that does not answer (any longer): what it was told is lost."""


class Control:
    """What one server is told; nothing is tried again, as most of it must not happen twice.

    Every method raises ServerGone, or a ValueError that names the URL where the server refuses.
    """

    def __init__(self, server: VllmServer) -> None:
        self.server = server

    def _tell(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        try:
            return self.server.call(method, path, body)
        except StatusError as error:
            hint = _MODE if error.status == 404 else ""
            problem = f"{error}{hint}"
        except TransientError as error:
            # What a worker raises is a 500 too: the server then lives on.
            if error.status != 500 or not self.is_alive():
                raise ServerGone(f"{self.server.url}: {path}: {error}") from error
            problem = str(error)
        raise ValueError(f"--vllm-url {self.server.url}: {path}: {problem}")

    def is_alive(self) -> bool:
        """Whether it says so."""
        try:
            self.server.call("GET", "/health")
        except (StatusError, TransientError):
            return False
        return True

    def wait(self, until: float) -> None:
        """Return once it answers again.

        Raises:
            ValueError: it does not, in time.
        """
        self.server.until_it_succeeds(
            "waiting for the server", lambda: self.server.call("GET", "/health"), until
        )

    def workers(self) -> int:
        """Processes that hold parts or copies of its model."""
        answer = self._tell("/get_world_size", method="GET")
        size = answer.get("world_size") if isinstance(answer, dict) else None
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"--vllm-url {self.server.url}: /get_world_size gave {shown(answer)}; vLLM 0.32 or "
                "newer is needed"
            )
        return size

    def nccl_version(self) -> str | None:
        """Of the package beside its torch; None where it does not say."""
        try:
            answer = self._tell("/server_info", method="GET")
        except (ServerGone, ValueError):
            return None
        system = answer.get("system_env") if isinstance(answer, dict) else None
        match = re.search(r"nvidia-nccl-cu\d+==([\d.]+)", str(system))
        return match and match[1]

    def init(self, info: dict[str, Any]) -> None:
        """Let its workers meet the trainer."""
        self._tell("/init_weight_transfer_engine", {"init_info": info})

    def begin_update(self, pause: str = "wait") -> None:
        """No request runs, nothing computed with the old weights is left, and new ones may come.

        ``pause``: ``wait`` for the ends of requests under way, or ``keep`` them, to go on with the
        new weights: vLLM then computes the keys and values of what they have anew.
        """
        self._tell(f"/pause?mode={pause}&clear_cache=true")
        try:
            self._tell("/start_weight_update")
        except ValueError:  # a job that was killed amid an update has left it open
            self._tell("/finish_weight_update")
            self._tell("/start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        """Some of the new weights."""
        self._tell("/update_weights", {"update_info": info})

    def end_update(self, version: str) -> None:
        """The new weights are all there: requests run again."""
        self._tell("/finish_weight_update", {"weight_version": version})
        self._tell("/resume")

    def version(self) -> str | None:
        """What the last finished update was called, since the server started."""
        answer = self._tell("/weight_info", method="GET")
        version = answer.get("weight_version") if isinstance(answer, dict) else None
        return version if isinstance(version, str) else None

    def is_asleep(self) -> bool:
        """Whether anything of it is."""
        answer = self._tell("/is_sleeping", method="GET")
        return isinstance(answer, dict) and answer.get("is_sleeping") is True

    def sleep(self, level: int) -> None:
        """Leave the GPU's memory; weights go to the host's (1), or nowhere (2)."""
        self._tell(f"/sleep?level={level}&mode=wait")

    def wake(self, what: str) -> None:
        """Take memory for ``weights`` or ``kv_cache`` again."""
        self._tell(f"/wake_up?tags={what}")
