"""What a step computes never asks the device for a number, which the host would wait for.

Fake tensors stand for what is on the device.  They have no numbers: whatever needs one (``item``,
``tolist``, a boolean index, ``nonzero``) raises.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_phf.config.flags import parse_args
from megatron_phf.data.batch import flow_window, make_sequences
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden import compare
from megatron_phf.hidden.plan import make_flow_plan
from megatron_phf.hidden.rows import SequenceShards, gather_rows, part_rows
from megatron_phf.hidden.spec import FlowSpec, flow_weights, terms_of
from megatron_phf.hidden.tap import FlowTap
from megatron_phf.hidden.targets import FlowTargets
from megatron_phf.hidden.term import STATES
from megatron_phf.losses import DivergenceSpec, chunked_divergence, chunked_log_probs
from megatron_phf.losses._vocab_parallel import VocabShard
from megatron_phf.model.architecture import parse_architecture
from megatron_phf.model.attention import CausalAttention
from megatron_phf.model.gpt_config import transformer_config
from megatron_phf.runtime import device
from megatron_phf.train.batch import PlacedBatch, flow_windows, place
from megatron_phf.train.metrics import OutputLoss
from megatron_phf.train.nonfinite import _all_finite
from megatron_phf.train.pipeline import KnownShapes, packed_seq_params

ROLLOUTS = [
    Rollout((1, 2), (3,), (4, 5, 6)),
    Rollout((7,), (8, 9, 1), (2, 3), response_mask=(False, True)),
]
WHOLE = SequenceShards()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Sends a tensor to the device, as ``device.from_host`` now does."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(device, "from_host", mode.from_tensor)
    # It swaps data pointers, of which fake tensors have none.
    monkeypatch.setattr(compare, "make_viewless_tensor", lambda inp, **kwargs: inp)
    return mode.from_tensor


def batch(packed: bool) -> PlacedBatch:
    (student,), _ = make_sequences(ROLLOUTS, [[0, 1]], flow_window(4, "even"), packed=packed)
    return place(student, WHOLE)


def test_fake_tensors_have_no_numbers(fake: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(DataDependentOutputException):
        fake(torch.ones(3)).tolist()


@pytest.mark.parametrize("objective", ["jsd", "policy_gradient", "cross_entropy"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_output_loss(objective: str, top_k: int, fake: Callable[[Tensor], Tensor]) -> None:
    rows, teacher, weight = (fake(torch.randn(n, 4)) for n in (6, 6, 9))
    ids = fake(torch.zeros(6, dtype=torch.long))
    rows.requires_grad_()
    settings = {"chunk_tokens": 4, "target_ids": ids, "objective": objective}
    spec = DivergenceSpec(top_k=top_k)
    made = chunked_divergence(rows, teacher, weight, weight, fake(torch.ones(6)), spec, **settings)
    made.loss.backward()
    assert chunked_log_probs(rows.detach(), weight, ids).shape == made.per_token.shape == (6,)
    padding = VocabShard(None, 0, 0, 9)
    assert padding.pick(fake(torch.ones(6, 0)), ids).shape == (6,)


def test_finiteness(fake: Callable[[Tensor], Tensor]) -> None:
    outputs = [OutputLoss(*(fake(torch.ones(5)) for _ in range(5)), torch.zeros(5))]
    values = {(0, layer): fake(torch.ones(3, 2)) for layer in range(9)}
    assert _all_finite(outputs, values).shape == ()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_and_flow_loss(packed: bool, fake: Callable[[Tensor], Tensor]) -> None:
    placed = batch(packed)
    hidden = fake(torch.randn(placed.shape[1], placed.shape[0], 8)).requires_grad_()
    for gather in (gather_rows, part_rows):
        assert gather(hidden, placed.own, WHOLE).shape == (4, 8)
    assert placed.targets.shape == (4,)
    assert placed.sequence.tolist() == [0, 0, 0, 1]  # on the host
    terms, weights = terms_of(FlowSpec()), flow_weights(2)
    stages = [[1, 2]]
    targets = FlowTargets(
        make_flow_plan([1, 2], stages, stages, 0, False), STATES["transitions"], 8
    )
    tap = FlowTap(terms, weights, {("mapped", "transitions"): targets}, WHOLE, 2)
    with torch.no_grad():
        tap.start_recording(flow_windows([placed]))
        for layer in (1, 2):
            tap.visit(layer, 0, hidden, 2 * hidden)
    tap.start_comparing(flow_windows([placed], 0.5))
    out = tap.visit(1, 0, hidden, 2 * hidden)
    tap.visit(2, 0, out, 3 * out).sum().backward()
    assert hidden.grad is not None
    assert tap.values[0, 2].shape == (3, 2)


def test_packed_rows_are_cut_by_lengths_of_the_host(fake: Callable[[Tensor], Tensor]) -> None:
    params = packed_seq_params(batch(packed=True), WHOLE, on_host=True)
    assert params is not None
    attention = CausalAttention.__new__(CausalAttention)
    torch.nn.Module.__init__(attention)
    attention.context = one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    attention.scale = 1.0
    query = fake(torch.randn(8, 2, 8))
    assert attention(query, query, query, None, packed_seq_params=params).shape == (8, 1, 16)
    angles = fake(torch.randn(params.max_seqlen_q, 1, 1, 8))
    turned = _apply_rotary_pos_emb_thd(query, params.cu_seqlens_q, angles, cp_group=one)
    assert turned.shape == query.shape
    there = packed_seq_params(batch(packed=True), WHOLE, on_host=False)
    assert there is not None
    with pytest.raises(DataDependentOutputException):
        there.cu_seqlens_q.tolist()


def test_context_parallel_masks_are_made_once_for_all_layers(
    fake: Callable[[Tensor], Tensor],
) -> None:
    attention = CausalAttention.__new__(CausalAttention)
    torch.nn.Module.__init__(attention)
    attention.context = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    first, again = (attention._masks([2, 4], torch.device("cpu")) for _ in range(2))
    assert [mask.shape for mask in first] == [(1, 1, 2, 4), (1, 1, 4, 8)]
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_stages_know_what_arrives() -> None:
    messages = KnownShapes.__new__(KnownShapes)
    messages.expect([(4, 1, 8), (6, 1, 8)])
    asked = [(True, False), (False, True), (True, True)]
    found = [messages._communicate_shapes(None, torch.ones(3), *each) for each in asked]
    assert found == [
        ((4, 1, 8), (0, 0, 0)),
        ((0, 0, 0), (4, 1, 8)),
        ((6, 1, 8), (6, 1, 8)),
    ]


def test_stages_do_not_wait_for_their_messages() -> None:
    content = {
        "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 8, "vocab_size": 16,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 8, "hidden_act": "silu",
    }  # fmt: skip
    config = parse_args(["--hf-model", "m", "--pipeline-model-parallel-size", "2"])
    assert not transformer_config(parse_architecture(content, "c"), config).batch_p2p_sync
