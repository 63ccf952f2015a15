"""What is simulated.  Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.teacher.architecture import Models


@dataclass(frozen=True)
class Job:
    """A job, as its flags describe it.

    Prompts and responses are as long as the configuration allows.  ``decode``: whether rollouts are
    decoded in process before the steps; ``steps``: the last is reported (the first one makes the
    optimizer's state); ``engine_stub``: whether a stand-in takes Transformer Engine's place.
    """

    config: Config
    models: Models
    world: int
    decode: bool = False
    steps: int = 1
    engine_stub: bool = False
