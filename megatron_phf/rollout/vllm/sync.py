"""The student's weights on vLLM servers: is each the right one, and how it gets new ones."""

from __future__ import annotations

import os
import shutil
import threading
import time

import torch

from megatron_phf.config.settings import Config
from megatron_phf.files.replace import is_copy, mark, not_ours
from megatron_phf.lora.files import save_peft_adapter
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.vllm.control import Control
from megatron_phf.rollout.vllm.flags import (
    read_api_key,
    server_urls,
    sync_directory,
    syncs_adapters,
    syncs_by_disk,
)
from megatron_phf.rollout.vllm.http import Patience
from megatron_phf.rollout.vllm.server import VllmServer
from megatron_phf.runtime import device
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.weights.huggingface import save_hf

# Of --distributed-timeout-minutes: what a phase may take while other ranks wait for its end.
_PHASE_SHARE = 0.9


def deadline(config: Config, phases: int = 1) -> float:
    """``time.monotonic()`` at which a phase that starts now, or so many in a row, must be over."""
    minutes = config.parallel.distributed_timeout_minutes
    return time.monotonic() + 60 * minutes * _PHASE_SHARE * phases


def connect(config: Config, arch: Architecture) -> list[VllmServer]:
    """The servers of ``--vllm-url``; rank 0 asks each what it serves.  Every rank calls.

    Raises:
        ValueError: one does not answer, or serves what this run cannot use; on every rank.
    """
    v = config.vllm
    patience = Patience(v.vllm_timeout_seconds, v.vllm_max_retries, v.vllm_backoff_seconds)
    key = read_api_key(config)
    servers = [VllmServer(url, patience, key) for url in server_urls(config)]
    on_first_rank(_check_servers, servers, config, arch)
    return servers


def _check_servers(servers: list[VllmServer], config: Config, arch: Architecture) -> None:
    way = config.vllm.vllm_weight_sync
    _check_way(way)
    for server in servers:
        _check_server(server, config, arch)
        if way in ("nccl", "torch_distributed") and device.has_cuda():
            _check_nccl(server)


def _check_way(way: str) -> None:
    if way in ("nccl", "ipc") and not device.has_cuda():
        raise ValueError(
            f"--vllm-weight-sync {way} is for GPUs, and there is none here; use torch_distributed"
        )


def _check_nccl(server: VllmServer) -> None:
    ours = ".".join(str(part) for part in torch.cuda.nccl.version()[:3])
    theirs = Control(server).nccl_version()
    if theirs not in (None, ours):
        raise ValueError(
            f"--vllm-url {server.url}: it has NCCL {theirs}, the trainer NCCL {ours}, and two "
            "versions refuse each other; install one in both environments (docs/vllm.md)"
        )


def _check_server(server: VllmServer, config: Config, arch: Architecture) -> None:
    card = _base_model(server, deadline(config))
    most, root = card.get("max_model_len"), card.get("root")
    wanted = config.data.max_prompt_length + config.rollout.max_new_tokens
    wanted = min(wanted, arch.max_position_embeddings)
    if isinstance(most, int) and most < wanted:
        raise ValueError(
            f"--vllm-url {server.url}: its sequences end at {most} tokens, --max-prompt-length + "
            f"--max-new-tokens need {wanted}; start it with --max-model-len {wanted}"
        )
    directory = sync_directory(config)
    if (
        syncs_by_disk(config)
        and not syncs_adapters(config)
        and os.path.realpath(str(root)) != directory
    ):
        raise ValueError(
            f"--vllm-url {server.url} serves {root}, but this run writes its weights to "
            f"--vllm-sync-dir {directory}; copy --hf-model there and start vllm serve {directory}"
        )


def _base_model(server: VllmServer, until: float) -> dict:
    """The card of the model itself: adapters have a parent."""
    cards = [card for card in server.models(until) if card.get("parent") is None]
    if not cards or not isinstance(cards[0].get("id"), str):
        raise ValueError(f"--vllm-url {server.url}: it serves no model")
    return cards[0]


class ServedModels:
    """What each server calls the student.

    ``adapter``: the newest; empty where new weights take the place of a server's old ones.
    ``drains``: they then wait for the requests under way.
    """

    drains, adapter = False, ""

    def __init__(
        self,
        servers: list[VllmServer],
        student: list[FlowGPTModel],
        arch: Architecture,
        config: Config,
    ) -> None:
        self._servers, self._student, self._arch, self._config = servers, student, arch, config
        # No other job's weights have names that begin so.
        self._prefix = f"phf-{on_first_rank(lambda: os.urandom(4).hex())}"
        self._models: dict[str, str] = {}
        self._locks = {server.url: threading.Lock() for server in servers}

    def model(self, server: VllmServer, until: float) -> str:
        """The model that a request to ``server`` names."""
        with self._locks[server.url]:
            if server.url not in self._models:
                self._models[server.url] = _base_model(server, until)["id"]
            return self._models[server.url]

    def restore(self, server: VllmServer, adapter: str, until: float) -> None:
        """What a request needs that a restarted server does not know."""

    def told(self, server: VllmServer) -> int | None:
        """The version of its weights by ``server``'s own word; None: it does not say."""
        return None


class WeightSync(ServedModels):
    """Brings the student's weights to all servers, as an adapter or as the model's own files.

    An adapter gets a new name each time: servers keep what they computed with the old one by name.
    Those that rollouts of the next steps may still be sampled with stay on the servers.
    """

    def __init__(
        self,
        servers: list[VllmServer],
        student: list[FlowGPTModel],
        arch: Architecture,
        config: Config,
    ) -> None:
        super().__init__(servers, student, arch, config)
        self._directory, self._adapters = sync_directory(config), syncs_adapters(config)
        self.drains = not self._adapters
        # The copy of --hf-model that servers started with is ours to replace.
        if not self._adapters:
            on_first_rank(self._adopt)
        self._names: dict[int, str] = {}  # of the adapters on the servers, by version

    def _adopt(self) -> None:
        source = str(self._config.model.hf_model)
        if not_ours(self._directory) and is_copy(self._directory, source):
            mark(self._directory)

    def push(self, version: int) -> None:
        """Export the student, and let every server use it from now on.  Every rank calls.

        Raises:
            ValueError: the files cannot be written, or a server does not take them; on every rank.
        """
        name = f"{self._prefix}-{version}"
        if self._adapters:
            target = self._path(name)
            save_peft_adapter(self._student, self._config, target, "--vllm-sync-dir")
        else:
            source, flag = self._config.model.hf_model, "--vllm-sync-dir"
            assert source is not None
            # vLLM processes each layer that the files have weights of: without its own, a tied
            # head keeps what was made of its old ones (on a CPU, its packed copy).
            save_hf(
                *(self._student, self._arch, self._config, source, self._directory),
                flag=flag,
                tied_head=True,
            )
        retired = self._retired(version) if self._adapters else []
        on_first_rank(self._tell, name, retired)
        for each in retired:
            del self._names[each]
        if self._adapters:
            self._names[version] = self.adapter = name

    def _retired(self, version: int) -> list[int]:
        """Adapters that nothing asks for any longer once that of ``version`` is there.

        What is still to be trained on was begun at most so many steps ago.
        """
        begun = version + 1 - self._config.rollout.max_off_policy_steps
        oldest = max((v for v in (*self._names, version) if v <= begun), default=0)
        return [v for v in self._names if v < oldest]

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _tell(self, name: str, retired: list[int]) -> None:
        until = deadline(self._config)
        for server in self._servers:
            if not self._adapters:
                server.reload_weights(until)
                continue
            server.load_adapter(name, self._path(name), until)
            for version in retired:
                server.unload_adapter(self._names[version], until)
        for version in retired:
            shutil.rmtree(self._path(self._names[version]), ignore_errors=True)

    def restore(self, server: VllmServer, adapter: str, until: float) -> None:
        """A restarted server knows no adapters; the model's own files it has read again itself."""
        with self._locks[server.url]:
            if adapter:
                server.load_adapter(adapter, self._path(adapter), until)
