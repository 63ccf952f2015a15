"""Microbatches under a token budget: everyone once, within the budget, as many as asked for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_phf.cli import preflight
from megatron_phf.config.flags import check_fields
from megatron_phf.config.settings import Config
from megatron_phf.data.batch import flow_window, make_sequences, token_counts
from megatron_phf.data.microbatches import (
    groups_under_budget,
    packed_tokens,
    padded_tokens,
    split_into,
)
from megatron_phf.data.rollouts import Rollout

sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=30)


@given(sizes, st.integers(1, 300), st.sampled_from([padded_tokens, packed_tokens]), st.data())
def test_a_partition_within_the_budget(lengths, budget, tokens, data) -> None:
    groups = groups_under_budget(lengths, budget, tokens)
    number = data.draw(st.integers(len(groups), len(lengths)))
    for found in (groups, split_into(groups, number, lengths, tokens)):
        assert sorted(i for group in found for i in group) == list(range(len(lengths)))
        assert all(len(g) == 1 or tokens(g, lengths) <= budget for g in found)
    assert len(split_into(groups, number, lengths, tokens)) == number
    # No two neighbours would fit into one; packed, no rollout into any group before its own.
    pairs = itertools.pairwise(groups)
    if tokens is packed_tokens:
        pairs = itertools.combinations(groups, 2)
    for first, second in pairs:
        assert tokens([*first, second[0]], lengths) > budget


def test_padding_counts() -> None:
    rollouts = [Rollout((1,) * 3, (1,) * 5, (2,) * n) for n in (1, 9, 2, 8)]
    window = flow_window(8, "even")
    students, teachers = make_sequences(rollouts, [[0, 1], [2, 3]], window, equal_lengths=True)
    assert token_counts([*students, *teachers]) == (20 + 12 + 20 + 20, 4 * (12 + 14))
    students, teachers = make_sequences(rollouts, [[1, 3], [2, 0]], window)
    assert token_counts([*students, *teachers]) == (72, 2 * (12 + 14) + 2 * (5 + 7))
    assert [student.tokens.shape[1] for student in students] == [12, 5]


def test_a_packed_row() -> None:
    rollouts = [Rollout((1,) * 3, (4,) * 5, (2, 7, 9)), Rollout((3, 5), (6,), (8,))]
    (student,), (teacher,) = make_sequences(
        rollouts, [[0, 1]], flow_window(8, "even"), packed=True, length_multiple=4
    )
    assert student.tokens.tolist() == [[1, 1, 1, 2, 7, 9, 3, 5, 8, 0, 0, 0]]
    limits = [side.cu_seqlens.tolist() for side in (student, teacher)]
    assert limits == [[0, 6, 9, 12], [0, 8, 10, 12]]
    assert (student.max_seqlen, teacher.max_seqlen) == (6, 8)
    assert student.predicting.tolist() == [[2, 3, 4], [7, 0, 0]]
    assert teacher.predicting.tolist() == [[4, 5, 6], [8, 0, 0]]
    assert student.window[student.window_valid].tolist() == [3, 4, 5, 8]
    assert student.target_ids().tolist() == [2, 7, 9, 8]
    assert token_counts([student, teacher]) == (19, 24)


def test_a_packed_row_for_context_parallelism() -> None:
    """Each sequence has its own padding, and the row more behind them."""
    rollouts = [Rollout((1,) * 3, (4,) * 5, (2, 7, 9)), Rollout((3, 5), (6,), (8,))]
    (student,), (teacher,) = make_sequences(
        rollouts,
        [[0, 1]],
        flow_window(8, "even"),
        packed=True,
        sequence_multiple=4,
        length_multiple=16,
    )
    assert student.tokens.tolist() == [[1, 1, 1, 2, 7, 9, 0, 0, 3, 5, 8, 0, 0, 0, 0, 0]]
    assert student.padding.nonzero()[:, 1].tolist() == [6, 7, 11, 12, 13, 14, 15]
    assert (student.cu_seqlens.tolist(), student.max_seqlen) == ([0, 8, 12, 16], 8)
    assert student.predicting.tolist() == [[2, 3, 4], [9, 0, 0]]
    assert student.window[student.window_valid].tolist() == [3, 4, 5, 10]
    assert student.target_ids().tolist() == [2, 7, 9, 8]
    assert token_counts([student, teacher]) == (19, 32)


def test_refused_flags() -> None:
    base = Config().replaced(hf_model="m", data="d")
    with pytest.raises(ValueError, match="takes the place of --micro-batch-size"):
        preflight._check_batching(base.replaced(max_tokens_per_microbatch=9, micro_batch_size=2))
    with pytest.raises(ValueError, match="--max-tokens-per-microbatch -1"):
        check_fields(base.replaced(max_tokens_per_microbatch=-1))
    with pytest.raises(ValueError, match="--pack-sequences needs --max-tokens-per-microbatch"):
        check_fields(base.replaced(pack_sequences=True))
    packed = base.replaced(max_tokens_per_microbatch=9, pack_sequences=True)
    lengths = {"max_prompt_length": 3, "max_teacher_prompt_length": 5, "max_new_tokens": 4}
    cut = packed.replaced(context_parallel_size=2, **lengths)
    with pytest.raises(ValueError, match=r"have 12 tokens .* 2 x --context-parallel-size 2"):
        preflight._check_batching(cut)
    preflight._check_batching(cut.replaced(max_tokens_per_microbatch=12))
    virtual = base.replaced(max_tokens_per_microbatch=9, num_virtual_stages_per_pipeline_rank=2)
    with pytest.raises(ValueError, match="interleaved schedule does not run"):
        preflight._check_batching(virtual)
