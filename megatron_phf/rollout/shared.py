"""One process of each copy of the model asks, and hands the answers to the others."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_phf import device, parallel
from megatron_phf.rollout.protocol import Response


def asked_once(ask: Callable[[], Sequence[Response]]) -> list[Response]:
    """What ``ask`` gives on one process of each data-parallel rank, on all of its model's.

    For engines outside this process, a server say.  Every rank calls it.

    Raises:
        ValueError: that of ``ask``; on every rank of the world.
    """
    responses: Sequence[Response] = []
    problem = None
    if parallel.decides_for_model():
        try:
            responses = ask()
        except ValueError as error:
            problem = str(error)
    parallel.raise_together(problem)
    return _of_the_one(list(responses))


def _of_the_one(value: Any) -> Any:
    """The picklable ``value`` of the process that decides for its model, on all of that model's."""
    content = pickle.dumps(value) if parallel.decides_for_model() else b""
    size = torch.tensor(len(content), device=device.device())
    parallel.broadcast_from_last_stage(size)
    data = torch.zeros(int(size), dtype=torch.uint8, device=size.device)
    if content:
        data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    parallel.broadcast_from_last_stage(data)
    return pickle.loads(data.cpu().numpy().tobytes())
