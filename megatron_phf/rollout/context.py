"""What the factory of an engine is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_phf.config.settings import Config
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.teacher.architecture import Models


@dataclass(frozen=True)
class Prompts:
    """What on-policy rollouts start from and end at."""

    tokenizer: Tokenizer
    pairs: Sequence[PromptPair]
    stop_ids: tuple[int, ...]


class RolloutContext:
    """The run as a factory sees it; ``prompts`` None: rollouts with prompts of their own.

    The student is there from the first use of :attr:`student` on, so that an engine which asks a
    server first does so before weights are read.
    """

    def __init__(
        self,
        config: Config,
        models: Models,
        prompts: Prompts | None,
        load: Callable[[], list[FlowGPTModel]],
    ) -> None:
        self.config, self.models, self._prompts, self._load = config, models, prompts, load

    @property
    def arch(self) -> Architecture:
        """The student's."""
        return self.models.student

    @property
    def prompts(self) -> Prompts:
        """Tokenizer, problems' prompts and stop tokens."""
        assert self._prompts is not None, "checked before launch: this engine reads --data"
        return self._prompts

    @cached_property
    def student(self) -> list[FlowGPTModel]:
        """This rank's chunks of the student that is trained; every rank asks for them."""
        return self._load()

    @property
    def vocab_size(self) -> int:
        """Token ids from here on one of the two models lacks."""
        return self.models.vocab_size
