"""What decoding must do beside giving the right tokens, in real processes (driver.py calls)."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_phf.rollout.megatron.engine import MegatronRollouts
from megatron_phf.rollout.megatron.graphs import StepGraphs
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, parallel

SAMPLES = 3  # of each prompt
NEW_TOKENS = 40  # the cache grows


class Traced:
    """Stands in for CUDA graphs: a step's operators, recorded once, then run on the same tensors.

    As a graph, it goes on with whatever the host knew when it was recorded, and refuses a step that
    waits for a value.
    """

    def __init__(self) -> None:
        self.traces = self.replays = 0

    def captured(self, function: Callable[[], object]) -> Callable[[], None]:
        """As ``device.captured``; tracing has run the step, which the first replay leaves out."""
        batch = function.__self__  # type: ignore[attr-defined]

        def step() -> torch.Tensor:
            function()
            return batch._status

        graph = make_fx(step)()
        status, first = batch._status, [True]
        self.traces += 1

        def replay() -> None:
            if first:
                first.pop()
                return
            status.copy_(graph())
            self.replays += 1

        return replay


class Late:
    """As ``device.LateReader`` on CUDA."""

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What was there at the call before."""
        before, self._before = self._before, tensor.clone()
        return before


def tokens_of(engine: MegatronRollouts, prompts: list, sampling: SamplingParams, ids: list) -> list:
    """Token ids, for the comparison."""
    return [r.token_ids for r in engine.generate(prompts, sampling, ids)]


def decoding(student: list, vocab_size: int, case: dict) -> dict:
    """Asserts on every rank; counts, for the test."""
    sampling = SamplingParams(**{**case["sampling"], "max_new_tokens": NEW_TOKENS})
    prompts = [prompt for prompt in case["prompts"] for _ in range(SAMPLES)]
    ids = list(range(100, 100 + len(prompts)))
    engine = MegatronRollouts(student, vocab_size, len(prompts))
    # Each alone, and so each prompt once for itself.
    pairs = zip(prompts, ids, strict=True)
    alone = [tokens_of(engine, [prompt], sampling, [i])[0] for prompt, i in pairs]
    assert not any({*sampling.stop_ids} & {*row[:-1]} for row in alone)
    read: list[int] = []
    forward = engine.forward

    def counted(tokens: torch.Tensor, *rest: object) -> torch.Tensor | None:
        read.append(len(tokens) if tokens.shape[1] > 1 else 0)
        return forward(tokens, *rest)

    with mock.patch.object(engine, "forward", counted):
        assert tokens_of(engine, prompts, sampling, ids) == alone
    # The host that is a step behind the device.
    with mock.patch.object(device, "LateReader", Late):
        assert tokens_of(engine, prompts, sampling, ids) == alone
    # Of fixed shapes; where ranks wait for each other nothing is recorded, and the host launches.
    traced = Traced()
    one = parallel.tensor_parallel_size() * parallel.pipeline_size() == 1
    captured = traced.captured if one else lambda step: step
    graphs = StepGraphs(wanted=True, required=True)
    replaying = MegatronRollouts(student, vocab_size, len(prompts), graphs)
    with mock.patch.object(device, "captured", captured):
        assert tokens_of(replaying, prompts, sampling, ids) == alone
    lengths = [len(row) for row in alone]
    return {
        "read": sum(read),
        "lengths": lengths,
        "traces": traced.traces,
        "replays": traced.replays,
    }
