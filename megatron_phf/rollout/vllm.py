"""Rollouts from vLLM servers, whose weights follow the student's.

One process of each data-parallel rank asks, and hands the answers to the others of its model.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_phf import device, parallel
from megatron_phf.config import Config
from megatron_phf.model.adapter_io import save_peft_adapter
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.model.hf_weights import save_hf
from megatron_phf.output import is_copy, mark, not_ours
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm_http import Patience
from megatron_phf.rollout.vllm_server import Question, Response, VllmServer
from megatron_phf.vllm_flags import read_api_key, server_urls, sync_directory, syncs_adapters

# Of --distributed-timeout-minutes: what a phase may take while other ranks wait for its end.
_PHASE_SHARE = 0.9


def _deadline(config: Config) -> float:
    return time.monotonic() + 60 * config.parallel.distributed_timeout_minutes * _PHASE_SHARE


def connect(config: Config, arch: Architecture) -> list[VllmServer]:
    """The servers of ``--vllm-url``; rank 0 asks each what it serves.  Every rank calls.

    Raises:
        ValueError: one does not answer, or serves what this run cannot use; on every rank.
    """
    v = config.vllm
    patience = Patience(v.vllm_timeout_seconds, v.vllm_max_retries, v.vllm_backoff_seconds)
    key = read_api_key(config)
    servers = [VllmServer(url, patience, key) for url in server_urls(config)]
    problem = None
    if parallel.is_first_rank():
        try:
            for server in servers:
                _check_server(server, config, arch)
        except ValueError as error:
            problem = str(error)
    parallel.raise_together(problem)
    return servers


def _check_server(server: VllmServer, config: Config, arch: Architecture) -> None:
    card = _base_model(server, _deadline(config))
    most, root = card.get("max_model_len"), card.get("root")
    wanted = config.data.max_prompt_length + config.rollout.max_new_tokens
    wanted = min(wanted, arch.max_position_embeddings)
    if isinstance(most, int) and most < wanted:
        raise ValueError(
            f"--vllm-url {server.url}: its sequences end at {most} tokens, --max-prompt-length + "
            f"--max-new-tokens need {wanted}; start it with --max-model-len {wanted}"
        )
    directory = sync_directory(config)
    if not syncs_adapters(config) and os.path.realpath(str(root)) != directory:
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


class WeightSync:
    """Brings the student's weights to all servers, as an adapter or as the model's own files.

    An adapter gets a new name each time: servers keep what they computed with the old one by name.
    """

    def __init__(
        self,
        servers: list[VllmServer],
        student: list[FlowGPTModel],
        arch: Architecture,
        config: Config,
    ) -> None:
        self._servers, self._student, self._arch, self._config = servers, student, arch, config
        self._directory, self._adapters = sync_directory(config), syncs_adapters(config)
        # The copy of --hf-model that servers started with is ours to replace.
        foreign = not self._adapters and parallel.is_first_rank() and not_ours(self._directory)
        if foreign and is_copy(self._directory, str(config.model.hf_model)):
            mark(self._directory)
        run = parallel.broadcast_object(os.urandom(4).hex() if parallel.is_first_rank() else None)
        self._prefix, self._name = f"phf-{run}", ""
        self._models: dict[str, str] = {}
        self._locks = {server.url: threading.Lock() for server in servers}

    def push(self, version: int) -> None:
        """Export the student, and let every server use it from now on.  Every rank calls.

        Raises:
            ValueError: the files cannot be written, or a server does not take them; on every rank.
        """
        old, self._name = self._name, f"{self._prefix}-{version}"
        if self._adapters:
            target = self._path(self._name)
            save_peft_adapter(self._student, self._arch, self._config, target, "--vllm-sync-dir")
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
        problem = None
        if parallel.is_first_rank():
            try:
                self._tell(old)
            except ValueError as error:
                problem = str(error)
        parallel.raise_together(problem)

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _tell(self, old: str) -> None:
        until = _deadline(self._config)
        for server in self._servers:
            if not self._adapters:
                server.reload_weights(until)
                continue
            server.load_adapter(self._name, self._path(self._name), until)
            if old:
                server.unload_adapter(old, until)
        if self._adapters and old:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def model(self, server: VllmServer, until: float) -> str:
        """The model that a request to ``server`` names."""
        if self._adapters:
            return self._name
        with self._locks[server.url]:
            if server.url not in self._models:
                self._models[server.url] = _base_model(server, until)["id"]
            return self._models[server.url]

    def restore(self, server: VllmServer, until: float) -> None:
        """A restarted server knows no adapters; the model's own files it has read again itself."""
        with self._locks[server.url]:
            if self._adapters:
                server.load_adapter(self._name, self._path(self._name), until)


class VllmRollouts:
    """Samples from vLLM servers (see ``RolloutEngine``); requests are spread over all of them."""

    def __init__(
        self, servers: list[VllmServer], sync: WeightSync, vocab_size: int, config: Config
    ) -> None:
        self._servers, self._sync, self._vocab_size = servers, sync, vocab_size
        self._config, self._synced = config, False

    def sync(self, iteration: int) -> None:
        """Before step ``iteration`` (1-based): the student's weights, where it is their turn."""
        if not self._synced or (iteration - 1) % self._config.vllm.vllm_sync_interval == 0:
            self._sync.push(iteration)
            self._synced = True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See ``RolloutEngine.generate``."""
        return [r.token_ids for r in self.respond(prompts, sampling, sample_ids, limits)]

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """As :meth:`generate`, with the tokens' log-probabilities.

        Raises:
            ValueError: a request has failed for good; on every rank of the world.
        """
        most = sampling.max_new_tokens
        room = itertools.repeat(most) if limits is None else (min(n, most) for n in limits)
        questions = [
            Question(list(prompt), sampling, parallel.derived_seed("vllm", sampling.seed, i), n)
            for prompt, i, n in zip(prompts, sample_ids, room, strict=False)
        ]
        responses: list[Response] = []
        problem = None
        if parallel.decides_for_model():
            try:
                responses = self._ask(questions)
            except ValueError as error:
                problem = str(error)
        parallel.raise_together(problem)
        return _shared(responses, len(questions))

    def _ask(self, questions: list[Question]) -> list[Response]:
        """All at once, as far as allowed; the first failure ends the rest."""
        until, stopped = _deadline(self._config), threading.Event()
        turns: Iterator[VllmServer] = itertools.cycle(self._servers)
        for _ in range(parallel.data_parallel_rank()):
            next(turns)

        def one(question: Question, server: VllmServer) -> Response:
            if stopped.is_set():
                raise ValueError("another request has failed")
            model = self._sync.model(server, until)
            return server.complete(
                question,
                model,
                self._vocab_size,
                until,
                stopped,
                lambda: self._sync.restore(server, until),
            )

        pool = ThreadPoolExecutor(self._config.vllm.vllm_concurrency)
        try:
            futures = [pool.submit(one, q, s) for q, s in zip(questions, turns, strict=False)]
            return [future.result() for future in futures]
        finally:
            stopped.set()
            # Not waiting for requests that nobody needs any longer.
            pool.shutdown(wait=False, cancel_futures=True)


def _shared(responses: list[Response], count: int) -> list[Response]:
    """The responses of the process that asked, on all processes of its model."""
    where = device.device()
    lengths = torch.zeros(count, dtype=torch.long, device=where)
    if responses:
        lengths.copy_(torch.tensor([len(r.token_ids) for r in responses]))
    parallel.broadcast_from_last_stage(lengths)
    sizes = lengths.tolist()
    ids = torch.zeros(sum(sizes), dtype=torch.long, device=where)
    logs = torch.zeros(sum(sizes), dtype=torch.float64, device=where)
    if responses:
        ids.copy_(torch.tensor([i for r in responses for i in r.token_ids]))
        logs.copy_(torch.tensor([x for r in responses for x in r.log_probs], dtype=torch.float64))
    parallel.broadcast_from_last_stage(ids)
    parallel.broadcast_from_last_stage(logs)
    pairs = zip(ids.split(sizes), logs.split(sizes), strict=True)
    return [Response(i.tolist(), x.tolist()) for i, x in pairs]
