"""One batch of rollouts: prompts read once each, then a token of every row a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_phf.rollout.megatron.cache import KVCache
from megatron_phf.rollout.megatron.graphs import StepGraphs
from megatron_phf.rollout.sampling import SamplingParams, uniforms
from megatron_phf.runtime import device, parallel

# A compaction copies the cache once; worth it when it frees this share of the rows.
_COMPACT_BELOW = 0.75


class Decoder(Protocol):
    """The model behind a batch (see ``MegatronRollouts``)."""

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[KVCache]) -> Tensor | None:
        """Logits behind the last column, on the last stage."""

    def choose(self, logits: Tensor, uniform: Tensor, sampling: SamplingParams) -> Tensor:
        """Token ids [b]."""

    def new_caches(self, most: int, seen: Tensor, fixed: bool = False) -> list[KVCache]:
        """One empty cache a model chunk."""


class Batch:
    """A batch from its prompts to its last token.

    All that changes from token to token is on the device: a step is the same for each of them.
    """

    def __init__(
        self,
        engine: Decoder,
        graphs: StepGraphs,
        sampling: SamplingParams,
        prompts: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        self._engine, self._graphs, self._sampling = engine, graphs, sampling
        # A prompt that is sampled several times is read once.
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        number = {prompt: row for row, prompt in enumerate(distinct)}
        self._prompt_of = [number[tuple(prompt)] for prompt in prompts]
        self._longest = max(map(len, distinct))
        tokens = torch.zeros(len(distinct), self._longest, dtype=torch.long)
        seen = torch.zeros(len(distinct), self._longest, dtype=torch.bool)
        for row, prompt in enumerate(distinct):
            tokens[row, self._longest - len(prompt) :] = torch.tensor(prompt)
            seen[row, self._longest - len(prompt) :] = True
        self._most = parallel.max_over_experts(max(limits))
        where, rows = device.device(), len(prompts)
        self._prompts, seen = tokens.to(where), seen.to(where)
        self._prompt_positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
        fixed = graphs.captures(sampling)
        self._caches = engine.new_caches(self._longest + self._most, seen, fixed)
        self._uniform = uniforms(sampling.seed, sample_ids, self._most).to(where)
        self._stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=where)
        self._limits = torch.tensor(limits, device=where)
        # Of all rows: what they have got, and how many of it are theirs.
        self._responses = torch.zeros(rows, self._most, dtype=torch.long, device=where)
        self._lengths = torch.zeros(rows, dtype=torch.long, device=where)
        # Of the rows still in the batch: which they are, their last token and where it stands.
        self._rows = torch.arange(rows, device=where)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=where)
        self._positions = torch.tensor([len(p) for p in prompts], device=where)
        self._active = torch.ones(rows, dtype=torch.bool, device=where)
        self._count = torch.zeros(1, dtype=torch.long, device=where)  # tokens of each row
        self._status = torch.empty(0)

    def run(self) -> list[list[int]]:
        """Generate until every row has stopped, here and where the same experts are used."""
        self._graphs.forget()
        self._read_prompts()
        watch = device.LateReader()
        for count in range(1, self._most):
            status = watch.read(self._status)
            if status is not None:
                if not status[0]:
                    break
                if self._compact(status[1:]):
                    watch = device.LateReader()  # what it has read is of other rows
            # All of them, whatever the first says.
            if any([cache.reserve(self._longest + count) for cache in self._caches]):
                self._graphs.forget()
            self._graphs.launch(self._step, self._sampling)
        self._graphs.forget()
        lengths = self._lengths.tolist()
        rows = self._responses.tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def _read_prompts(self) -> None:
        """Read the prompts, and choose the first token of every row."""
        logits = self._engine.forward(self._prompts, self._prompt_positions, self._caches)
        if len(self._prompts) < len(self._rows):
            of = torch.tensor(self._prompt_of, device=self._rows.device)
            logits = None if logits is None else logits[of]
            for cache in self._caches:
                cache.select(of)
        self._take(logits)

    def _step(self) -> None:
        """One more token of every row: from the batch's tensors into them, nothing on the host."""
        tokens, positions = self._tokens[:, None], self._positions[:, None]
        logits = self._engine.forward(tokens, positions, self._caches)
        self._positions += 1
        self._take(logits)

    def _take(self, logits: Tensor | None) -> None:
        """Choose the tokens that come next, equal on all model-parallel ranks."""
        column = self._count.expand_as(self._rows)
        if logits is not None:
            uniform = self._uniform[self._rows, column]
            self._tokens.copy_(self._engine.choose(logits, uniform, self._sampling))
        # One rank decides: equal logits on all ranks are not promised on every device.
        parallel.broadcast_from_last_stage(self._tokens)
        self._responses[self._rows, column] = self._tokens
        self._lengths.index_add_(0, self._rows, self._active.long())
        self._count += 1
        stopped = (self._tokens[:, None] == self._stop_ids).any(-1)
        self._active &= ~stopped & (self._limits > self._count)
        going = parallel.largest_over_experts(self._active.any()[None].int())
        self._status = torch.cat((going, self._active))

    def _compact(self, active: Tensor) -> bool:
        """Let finished rows leave once they are many; ``active`` is on the host."""
        keep = active.nonzero().flatten()
        if len(keep) == 0:  # others that use the same experts go on: one row keeps them company
            keep = torch.zeros(1, dtype=torch.long)
        if len(keep) > _COMPACT_BELOW * len(active):
            return False
        keep = device.to_device(keep)
        for name in ("_rows", "_tokens", "_positions", "_active", "_limits"):
            setattr(self, name, getattr(self, name)[keep])
        for cache in self._caches:
            cache.select(keep)
        self._graphs.forget()
        return True
