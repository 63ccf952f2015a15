"""Which rollouts share a microbatch, where a token budget decides (--max-tokens-per-microbatch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# The tokens that a rollout asks of each model: (student, teacher).
Lengths = Sequence[tuple[int, int]]
# Those of a microbatch of these rollouts, on its larger side.
Tokens = Callable[[Sequence[int], Lengths], int]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def padded_tokens(group: Sequence[int], lengths: Lengths) -> int:
    """Tokens of the larger side of a microbatch, every row as long as its longest."""
    return len(group) * max(max(lengths[i]) for i in group)


def packed_tokens(group: Sequence[int], lengths: Lengths) -> int:
    """Tokens of the larger side of a microbatch in one row."""
    return max(sum(lengths[i][side] for i in group) for side in (0, 1))


def groups_under_budget(
    lengths: Lengths, budget: int, tokens: Tokens = padded_tokens
) -> list[list[int]]:
    """Numbers of the rollouts of each microbatch, the longest first.

    As few microbatches as filling them in that order gives: the last one with neighbours in
    length, or, packed, the first that has room.  A rollout longer than ``budget`` has one of its
    own.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-max(lengths[i]), i)):
        open_ones = groups if tokens is packed_tokens else groups[-1:]
        room = [g for g in open_ones if tokens([*g, i], lengths) <= budget]
        if room:
            room[0].append(i)
        else:
            groups.append([i])
    return groups


def split_into(
    groups: Sequence[Sequence[int]], number: int, lengths: Lengths, tokens: Tokens = padded_tokens
) -> list[list[int]]:
    """The same order in ``number`` groups, at least as many as there are: the heaviest are halved.

    Data-parallel ranks must agree in the number; halves keep every budget.
    """
    result = [list(group) for group in groups]
    assert len(result) <= number <= len(lengths), "a microbatch has at least one rollout"
    while len(result) < number:
        sizes = [tokens(g, lengths) if len(g) > 1 else 0 for g in result]
        k = sizes.index(max(sizes))
        middle = (len(result[k]) + 1) // 2
        result[k : k + 1] = [result[k][:middle], result[k][middle:]]
    return result
