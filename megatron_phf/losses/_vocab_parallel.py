"""One chunk of tokens over a (sharded) vocabulary: values and the gradient in its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_phf.losses.divergence import DivergenceSpec
from megatron_phf.losses.objectives import Divergence, SampledToken


@dataclass(frozen=True)
class VocabShard:
    """This rank's ``size`` entries from global id ``start``, of ``total`` in all (no padding)."""

    group: dist.ProcessGroup | None
    start: int
    size: int
    total: int

    def sum(self, x: Tensor) -> Tensor:
        """In place: the sum over the shards."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """In place: the maximum over the shards."""
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """logits [c, v], overwritten -> log probabilities over all shards (-inf stays)."""
        return self.log_softmax_and_top_(logits)[0]

    def log_softmax_and_top_(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`log_softmax_`, and the largest of each token's over all shards [c, 1]."""
        if self.group is None:
            logs = F.log_softmax(logits, dim=-1)
            return logs, logs.amax(-1, keepdim=True)
        floor = logits.new_full((logits.shape[0], 1), torch.finfo(logits.dtype).min)
        # A shard that is all padding has no entries, hence no maximum of its own.
        top = self.max(logits.amax(-1, keepdim=True) if self.size else floor)
        total = self.sum((logits.sub_(top)).exp().sum(-1, keepdim=True))
        total.log_()
        return logits.sub_(total), total.neg()  # the largest logit is 0 now

    def _column(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Global ids [c] -> any column of this shard [c, 1], False [c] where it is not the id's.

        Which ids are here is never asked for: the host would wait for the answer.
        """
        local = ids - self.start
        return local.clamp(0, self.size - 1)[:, None], (local >= 0) & (local < self.size)

    def pick(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [c, v] -> its entry of each id [c]; 0 where another shard has that."""
        if not self.size:
            return x.new_zeros(len(ids))
        column, here = self._column(ids)
        return x.gather(1, column)[:, 0].masked_fill(~here, 0)

    def add_at(self, x: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """In place: x [c, v] with ``values`` [c] added to the ids' entries, where they are here."""
        if self.size:
            column, here = self._column(ids)
            x.scatter_add_(1, column, values.masked_fill(~here, 0)[:, None])
        return x

    def top_k_mask(self, logits: Tensor, k: int) -> Tensor:
        """logits [c, v] -> bool [c, v]: in the k largest of all shards, ties to the lowest id."""
        # A stable sort breaks ties by position; topk promises nothing about them.
        values, index = logits.sort(dim=-1, descending=True, stable=True)
        entries = logits.shape[-1]
        missing = max(k - entries, 0)
        values = F.pad(values[:, :k], (0, missing), value=-math.inf).contiguous()
        index = F.pad(index[:, :k], (0, missing), value=entries)
        rank = 0
        if self.group is not None:
            parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(parts, values, group=self.group)
            values, rank = torch.cat(parts, dim=-1), dist.get_rank(self.group)
        # Shards come in the order of their ids, so that this sort too prefers the lowest id.
        winners = values.sort(dim=-1, descending=True, stable=True).indices[:, :k] - rank * k
        here = (winners >= 0) & (winners < k - missing)
        # One column too many takes the winners of other shards; asking how many here would wait.
        chosen = index.gather(1, winners.clamp(0, k - 1)).masked_fill_(~here, entries)
        mask = logits.new_zeros((len(logits), entries + 1), dtype=torch.bool)
        return mask.scatter_(1, chosen, True)[:, :entries]


def vocab_shard(
    group: dist.ProcessGroup | None, start: int, rows: int, vocab_size: int | None
) -> VocabShard:
    """The shard of an output weight with ``rows`` rows here, of which padding is left out.

    ``vocab_size``: real entries of all ranks together; None: every row is one.
    """
    world = 1 if group is None else dist.get_world_size(group)
    total = vocab_size if vocab_size is not None else rows * world
    return VocabShard(group, start, min(max(total - start, 0), rows), total)


def divergence_chunk(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    spec: DivergenceSpec,
    shard: VocabShard,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Tempered logits [c, v] (overwritten) -> values [5, c] and the divergence's gradient [c, v].

    Values: divergence, clipped, entropy of the teacher, of the student, whether both have the same
    most probable entry; the gradient is that of each token's divergence in its tempered student
    logits.
    """
    absent = ~shard.top_k_mask(teacher, spec.top_k) if spec.top_k else None
    if absent is not None:
        student.masked_fill_(absent, -math.inf)
        teacher.masked_fill_(absent, -math.inf)
    (log_s, top_s), (log_t, top_t) = map(shard.log_softmax_and_top_, (student, teacher))
    agree = _both_top(log_s == top_s, log_t == top_t)
    if absent is not None:  # any finite number will do: their terms are masked out below
        log_s.masked_fill_(absent, 0.0)
        log_t.masked_fill_(absent, 0.0)
    terms = divergence.terms(log_s, log_t, spec.beta)
    entropy = -(log_t.exp().mul_(log_t))
    slope = divergence.slope(log_s, log_t, spec.beta, terms) if with_gradient else None
    for x in (terms, entropy, slope):
        if x is not None and absent is not None:
            x.masked_fill_(absent, 0.0)
    p_s = log_s.exp()
    above = terms > spec.clip if spec.clip_mode == "entry" else None
    if above is not None:
        terms.clamp_(max=spec.clip)
        if slope is not None:
            slope.masked_fill_(above, 0.0)
    student_entropy = log_s.mul_(p_s).sum(-1).neg_()  # an absent one's is 0
    parts = [terms.sum(-1), entropy.sum(-1), student_entropy, agree.to(terms)]
    parts.append(parts[0].new_zeros(parts[0].shape) if above is None else above.sum(-1).to(terms))
    parts += [] if slope is None else [slope.sum(-1)]
    sums = shard.sum(torch.stack(parts))  # one message for all of them
    values, token_above = _values(sums, min(spec.top_k or shard.total, shard.total), spec)
    if slope is None:
        return values, None
    if absent is not None:
        p_s.masked_fill_(absent, 0.0)
    gradient = slope.sub_(p_s.mul_(sums[5][:, None]))
    if token_above is not None:
        gradient.masked_fill_(token_above[:, None], 0.0)
    return values, gradient


def _values(sums: Tensor, entries: int, spec: DivergenceSpec) -> tuple[Tensor, Tensor | None]:
    divergence, above = sums[0], sums[4]
    seen = sums[1], sums[2], (sums[3] > 0).to(sums)
    if spec.clip_mode == "entry":
        return torch.stack((divergence, above / entries, *seen)), None
    if spec.clip_mode == "none":
        return torch.stack((divergence, above, *seen)), None
    token_above = divergence > spec.clip
    clamped = divergence.clamp(max=spec.clip)
    return torch.stack((clamped, token_above.to(clamped), *seen)), token_above


def _both_top(student: Tensor, teacher: Tensor) -> Tensor:
    """bool [c, v] of the most probable entries -> how many here are both's [c]; summed, if any."""
    return student.logical_and_(teacher).sum(-1)


def sampled_token_chunk(
    student: Tensor,
    teacher: Tensor,
    objective: SampledToken,
    targets: Tensor,
    shard: VocabShard,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`divergence_chunk`, for the loss of the sampled tokens ``targets`` [c]."""
    (log_s, top_s), (log_t, top_t) = map(shard.log_softmax_and_top_, (student, teacher))
    agree = _both_top(log_s == top_s, log_t == top_t).to(log_s)
    entropies = [-(x.exp() * x).sum(-1) for x in (log_t, log_s)]
    picked = [shard.pick(x, targets) for x in (log_s, log_t)]
    sums = shard.sum(torch.stack((*picked, *entropies, agree)))
    advantage = objective.advantage(sums[0], sums[1]).expand_as(sums[0])
    values = torch.stack(
        (-advantage * sums[0], torch.zeros_like(advantage), *sums[2:4], (sums[4] > 0).to(sums))
    )
    if not with_gradient:
        return values, None
    gradient = log_s.exp_().mul_(advantage[:, None])
    return values, shard.add_at(gradient, targets, -advantage)
