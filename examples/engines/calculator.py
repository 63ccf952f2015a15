"""An agent loop as a rollout engine: the student calls a calculator, whose answers are not scored.

    bash examples/pretrain_phf.sh --hf-model DIR --data problems.jsonl \\
        --rollout-engine examples.engines.calculator:make_engine

A call is an expression with its equals sign: behind ``12*3=`` the loop writes ``36``, and the
student goes on from there.  Both models read the ``36``; no loss counts it, for the student did not
write it.  The student samples in process, in any layout; another engine could stand in its place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.rollout.context import RolloutContext
from megatron_phf.rollout.megatron.engine import student_engine
from megatron_phf.rollout.protocol import Response, RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel

_CALL = re.compile(r"(\d{1,12}) *([-+*]) *(\d{1,12}) *=$")
_CALLS = 8  # of one response at most


def make_engine(context: RolloutContext) -> Calculator:
    """The factory that --rollout-engine names."""
    student = student_engine(context.config, context.models, context.student)
    return Calculator(student, context.prompts.tokenizer, context.vocab_size)


def calculate(text: str) -> str | None:
    """What the calculator answers to a text that ends in a call; None where it does not."""
    call = _CALL.search(text)
    if call is None:
        return None
    a, b = int(call[1]), int(call[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[call[2]])


@dataclass
class _Dialogue:
    """A response as it grows; ``room``: tokens that it can have."""

    prompt: list[int]
    sample_id: int
    room: int
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    over: bool = False
    policy_version: int | None = None

    def add(self, ids: Sequence[int], written: bool) -> None:
        """Tokens of the student, or of the tool; what has no room is cut off."""
        fits = list(ids)[: self.left]
        self.ids += fits
        self.mask += [written] * len(fits)

    @property
    def left(self) -> int:
        """Tokens that still have room."""
        return self.room - len(self.ids)


class Calculator:
    """See ``RolloutEngine``."""

    def __init__(self, student: RolloutEngine, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._student, self._tokenizer = student, tokenizer
        known = range(min(vocab_size, tokenizer.largest_id + 1))
        # The student's turn ends where it may be calling.
        self._equals = tuple(i for i in known if tokenizer.decode([i]).endswith("="))

    def prepare(self, step: int) -> None:
        """The student's own engine may need it."""
        self._student.prepare(step)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """Turns of all dialogues together, until each has ended or has no room."""
        most = sampling.max_new_tokens
        limits = [most] * len(prompts) if limits is None else [min(n, most) for n in limits]
        rows = zip(prompts, sample_ids, limits, strict=True)
        dialogues = [_Dialogue(list(prompt), i, room) for prompt, i, room in rows]
        # As many turns on each rank: ranks that share experts sample together or not at all.
        for turn in range(_CALLS + 1):
            self._turn([d for d in dialogues if not d.over], sampling, turn)
        return [Response(d.ids, None, d.mask, d.policy_version) for d in dialogues]

    def _turn(self, dialogues: list[_Dialogue], sampling: SamplingParams, turn: int) -> None:
        calls = self._equals if turn < _CALLS else ()
        # Otherwise a sample would meet the random numbers of its first turn again.
        seed = parallel.derived_seed("turn", sampling.seed, turn) if turn else sampling.seed
        answers = self._student.generate(
            [[*d.prompt, *d.ids] for d in dialogues],
            dataclasses.replace(sampling, stop_ids=(*sampling.stop_ids, *calls), seed=seed),
            [d.sample_id for d in dialogues],
            [d.left for d in dialogues],
        )
        for d, answer in zip(dialogues, answers, strict=True):
            d.add(answer.token_ids, written=True)
            d.policy_version = answer.policy_version
            if d.ids[-1] in calls and d.ids[-1] not in sampling.stop_ids:
                result = calculate(self._tokenizer.decode(d.ids))
                d.add([] if result is None else self._tokenizer.encode(result), written=False)
                d.over = d.left == 0
            else:
                d.over = True
