"""Rollouts as microbatches, padded or packed, for the student's and the teacher's forward pass.

The teacher reads the same response behind another prompt, so that a generated token sits at
another absolute position in each sequence.  Everything here is indexed by the generated position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_phf.data.microbatches import round_up
from megatron_phf.data.rollouts import Rollout
from megatron_phf.losses import window_batch


@dataclass(frozen=True)
class SequenceBatch:
    """b sequences of prompt and response, padded on the right to s tokens, or packed to one row.

    tokens [b, s], or [1, s]; ``predicting`` [b, r]: positions whose outputs predict the r response
    tokens; ``scored`` bool [b, r]: False where a shorter response is padded, and where the student
    did not write the token; ``window`` [b, m] and ``window_valid`` bool [b, m]: positions of the
    flow window's own tokens, all of them scored; ``padding`` bool, as tokens: True behind the
    response; ``log_probs`` fp64 [b, r]: those of the response tokens that another program sampled,
    or None; ``cu_seqlens`` int32 [n + 1]: where the sequences of a packed row start, each with its
    padding and the row's own the last of them, and the row's length; ``max_seqlen``: of the
    longest; or None.  Positions count from the row's start.
    """

    tokens: Tensor
    predicting: Tensor
    scored: Tensor
    window: Tensor
    window_valid: Tensor
    padding: Tensor
    log_probs: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None

    def target_ids(self) -> Tensor:
        """The scored response tokens, flat [n], in the order of ``scored``."""
        rows = self.tokens.expand(len(self.predicting), -1)
        return rows.gather(1, self.predicting + 1)[self.scored]

    def window_tokens(self) -> Tensor:
        """Which response token each of the window's is, int64 [b, m]; 0 where it is not valid.

        A token is predicted one position before its own.
        """
        number = torch.arange(self.scored.shape[1])
        # Where the first response token is predicted: any scored one tells.
        first = (self.predicting - number).masked_fill(~self.scored, 0)
        if first.shape[1] == 0:  # all responses are empty
            return torch.zeros_like(self.window)
        index = self.window - 1 - first.amax(1, keepdim=True)
        return index.masked_fill(~self.window_valid, 0)


def _scored(rollouts: Sequence[Rollout]) -> Tensor:
    """bool [b, r]: the tokens of each response that count."""
    rows = [torch.tensor(r.scored, dtype=torch.bool) for r in rollouts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _window(
    scored: Tensor, rule: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """scored [b, r] -> generated positions of the window [b, m], valid bool [b, m].

    The rule chooses among a response's scored tokens, as if the others were not there.
    """
    positions, valid = rule(scored.sum(1).tolist())
    # A stable sort of "not scored": the scored positions first, in order.
    order = (~scored).int().sort(dim=1, stable=True).indices
    if order.shape[1] == 0:  # all responses are empty
        return positions, valid
    return order.gather(1, positions).masked_fill(~valid, 0), valid


def _sequences(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    length: int,
    scored: Tensor,
    window: tuple[Tensor, Tensor],
    pad_id: int,
    sizes: Sequence[int] | None,
) -> SequenceBatch:
    """``sizes``: of each sequence in the one packed row; None: a row each."""
    starts = [0] * len(pairs) if sizes is None else list(accumulate(sizes, initial=0))[:-1]
    shape = (len(pairs) if sizes is None else 1, length)
    tokens = torch.full(shape, pad_id, dtype=torch.long)
    padding = torch.ones(shape, dtype=torch.bool)
    for i, (start, (prompt, response)) in enumerate(zip(starts, pairs, strict=True)):
        row, end = i if sizes is None else 0, start + len(prompt) + len(response)
        tokens[row, start:end] = torch.tensor([*prompt, *response])
        padding[row, start:end] = False
    ends = zip(starts, pairs, strict=True)
    responses = torch.tensor([start + len(prompt) for start, (prompt, _) in ends])[:, None]
    generated = torch.arange(scored.shape[1])[None].expand(len(pairs), -1)
    # The output at position t-1 predicts token t: the last prompt token predicts the first one.
    predicting = (responses - 1 + generated).masked_fill(~scored, 0)
    positions, valid = window
    batch = SequenceBatch(tokens, predicting, scored, responses + positions, valid, padding)
    if sizes is None:
        return batch
    left = length - sum(sizes)
    assert left >= 0, "checked before launch, or where the rollouts are read"
    sizes = [*sizes, *([left] if left else [])]
    limits = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
    return dataclasses.replace(batch, cu_seqlens=limits, max_seqlen=max(sizes))


def _log_probs(rollouts: Sequence[Rollout]) -> Tensor | None:
    """fp64 [b, r], 0 behind a response."""
    given = [r.log_probs for r in rollouts if r.log_probs is not None]
    if len(given) < len(rollouts):
        return None
    rows = [torch.tensor(each, dtype=torch.float64) for each in given]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _sizes(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], multiple: int) -> list[int]:
    return [round_up(len(prompt) + len(response), multiple) for prompt, response in pairs]


def make_sequences(
    rollouts: Sequence[Rollout],
    order: Sequence[Sequence[int]],
    window: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    *,
    equal_lengths: bool = False,
    length_multiple: int = 1,
    sequence_multiple: int = 1,
    pad_id: int = 0,
    packed: bool = False,
    row_length: int | None = None,
) -> tuple[list[SequenceBatch], list[SequenceBatch]]:
    """The microbatches of this rank's rollouts as the student, and as the teacher reads them.

    Args:
        order: the numbers of the rollouts of each microbatch.
        window: scored tokens of each response [b] -> (which of them [b, m], valid [b, m]), see
            ``flow_window``.
        equal_lengths: all rows of a model are equally long: pipeline stages then need not tell
            each other shapes.
        length_multiple: rows are padded to a multiple of this (sequence parallelism: TP).
        sequence_multiple: so is each sequence of a packed row (context parallelism: 2 CP).
        packed: the sequences of a microbatch lie in one row, one behind the other.
        row_length: of each packed row; None: as long as it must be.
    """
    assert not (packed and equal_lengths), "packed rows have lengths of their own"
    prompts = ([r.student_prompt_ids for r in rollouts], [r.teacher_prompt_ids for r in rollouts])
    sides = [list(zip(side, (r.response_ids for r in rollouts), strict=True)) for side in prompts]
    longest = [max(_sizes(side, 1)) for side in sides]
    students, teachers = [], []
    for rows in order:
        members = [rollouts[i] for i in rows]
        pairs = [[side[i] for i in rows] for side in sides]
        sizes = [_sizes(side, sequence_multiple) for side in pairs]
        needed = longest if equal_lengths else [sum(n) if packed else max(n) for n in sizes]
        lengths = [row_length or round_up(n, length_multiple) for n in needed]
        scored = _scored(members)
        positions = _window(scored, window)
        student, teacher = (
            _sequences(side, length, scored, positions, pad_id, each if packed else None)
            for side, length, each in zip(pairs, lengths, sizes, strict=True)
        )
        assert torch.equal(student.target_ids(), teacher.target_ids()), (
            "student and teacher must score the same response tokens"
        )
        students.append(dataclasses.replace(student, log_probs=_log_probs(members)))
        teachers.append(teacher)
    return students, teachers


def token_counts(batches: Sequence[SequenceBatch]) -> tuple[int, int]:
    """Tokens that are read, without and with padding."""
    computed = sum(batch.tokens.numel() for batch in batches)
    return computed - sum(int(batch.padding.sum()) for batch in batches), computed


def flow_window(size: int, rule: str) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """The window rule as :func:`make_local_batch` takes it."""
    return lambda lengths: window_batch(lengths, size, rule)
