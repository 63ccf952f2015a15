"""Where a position lives when sequences are sharded over context and sequence parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_phf.hidden.rows import RowPlaces, SequenceShards, gather_rows, with_rows


def group(size: int, rank: int) -> SimpleNamespace | None:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank) if size > 1 else None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("context", "sequence"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_position_is_in_one_place(context: int, sequence: int, packed: bool) -> None:
    multiple = SequenceShards(group(context, 0), group(sequence, 0)).length_multiple
    length, limits = 3 * multiple, None
    if packed:  # the first sequence as short as it can be
        limits = torch.tensor([0, 2 * context, multiple, length], dtype=torch.int32).unique()
    whole = torch.arange(2 * length).view(2, length)  # the token's value names its place
    positions = torch.arange(length).flip(0).expand(2, -1)
    found, parts = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length).long()
    for c in range(context):
        for s in range(sequence):
            shards = SequenceShards(group(context, c), group(sequence, s))
            piece = shards.piece(whole, limits)
            assert piece.shape[1] == length // context // sequence
            index, mine = shards.in_part(positions, length, limits)
            part = shards.part(whole, limits)
            assert torch.equal(part.gather(1, index)[mine], whole.flip(1)[mine])
            places = shards.places(index, mine, torch.arange(2)[:, None], whole.shape)
            index, here = shards.in_piece(index, mine, piece.shape[1])
            # Their numbers among the rows of a hidden state [s_local, b, h]:
            taken = piece.T.flatten()[places.flat]
            assert torch.equal(taken[here], whole.flip(1)[here])
            if places.here is None:
                assert here.all()
            else:
                assert torch.equal(places.here[..., 0], here)
            assert torch.equal(piece.gather(1, index)[here], whole.flip(1)[here])
            found += here
            parts += mine
    assert (found == 1).all()
    assert (parts == sequence).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_taken_along_have_the_gradient_of_two_branches(dtype: torch.dtype) -> None:
    """Bit for bit; a short window repeats a place, with gradient zero."""
    hidden, onwards = (torch.randn(6, 2, 4, dtype=dtype) for _ in range(2))
    places = RowPlaces(torch.tensor([[3, 7, 11], [0, 4, 0]]), None)
    weights = torch.randn(2, 3, 4, dtype=dtype)
    weights[1, 2] = 0
    gradients = []
    for together in (True, False):
        x = hidden.clone().requires_grad_()
        if together:
            passed, rows = with_rows(x, places, SequenceShards())
        else:
            passed, rows = x, gather_rows(x, places, SequenceShards())
        assert torch.equal(rows, hidden.flatten(0, 1)[places.flat])
        assert torch.equal(passed, hidden)
        torch.autograd.backward((passed, rows), (onwards, weights))
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert not torch.equal(gradients[0], onwards)


def test_zigzag_order_is_megatrons() -> None:
    parts = [SequenceShards(group(2, rank), None).part(torch.arange(8)[None]) for rank in (0, 1)]
    assert [p.flatten().tolist() for p in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_a_packed_row_is_cut_as_transformer_engine_cuts_it() -> None:
    """Each sequence for itself, and its two chunks beside each other."""
    limits, row = torch.tensor([0, 8, 12], dtype=torch.int32), torch.arange(12)[None]
    parts = [SequenceShards(group(2, rank), None).part(row, limits) for rank in (0, 1)]
    assert [p.flatten().tolist() for p in parts] == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


def test_a_position_behind_the_row_is_nowhere() -> None:
    """The window of an empty response may begin there."""
    limits = torch.tensor([0, 8, 12], dtype=torch.int32)
    for rank in (0, 1):
        shards = SequenceShards(group(2, rank), None)
        assert not shards.in_part(torch.tensor([[12]]), 12, limits)[1].any()
