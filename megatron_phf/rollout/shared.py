"""One process of each copy of the model asks, and hands the answers to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_phf.rollout.protocol import Response
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_every_rank


def asked_once(ask: Callable[[], Sequence[Response]]) -> list[Response]:
    """What ``ask`` gives on one process of each data-parallel rank, on all of its model's.

    For engines outside this process, a server say.  Every rank calls it.

    Raises:
        ValueError: that of ``ask``; on every rank of the world.
    """
    responses = on_every_rank(lambda: list(ask()) if parallel.decides_for_model() else [])
    return parallel.share_object(responses)
