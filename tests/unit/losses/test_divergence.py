"""The output losses: hand-computed values, limits, clips, top-k, gradients; chunked = whole."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_phf import reference
from megatron_phf.losses import (
    DivergenceSpec,
    chunked_divergence,
    generalized_jsd,
    policy_gradient_loss,
)
from megatron_phf.losses import chunked as chunked_module
from megatron_phf.losses.chunked import _BLOCK_BYTES, _Gradients
from megatron_phf.reference.output_loss import observed

seeds = st.integers(0, 2**31 - 1)
specs = st.builds(
    DivergenceSpec,
    beta=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 1.1]),
    clip_mode=st.sampled_from(["entry", "token", "none"]),
    clip=st.sampled_from([0.01, 0.05, 0.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits(seed: int, n: int = 4, v: int = 7) -> tuple[Tensor, Tensor]:
    return 2 * normal(seed, n, v), 2 * normal(seed + 1, n, v)


def plain(**settings) -> DivergenceSpec:
    return DivergenceSpec(**{"temperature": 1.0, "clip_mode": "none", **settings})


def test_value_by_hand() -> None:
    student = torch.tensor([[0.5, 0.5]]).log()
    teacher = torch.tensor([[0.9, 0.1]]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    m = (0.7, 0.3)
    middle = 0.5 * sum(p * math.log(p / q) for p, q in zip((0.9, 0.1), m, strict=True))
    middle += 0.5 * sum(p * math.log(p / q) for p, q in zip((0.5, 0.5), m, strict=True))
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.5, middle)):
        found = generalized_jsd(student, teacher, plain(beta=beta))
        assert float(found.per_token) == pytest.approx(expected, rel=1e-6)
        assert float(found.clipped) == 0
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(found.teacher_entropy) == pytest.approx(entropy, rel=1e-6)


def test_clips_by_hand() -> None:
    student = torch.tensor([[0.5, 0.5]]).log()
    teacher = torch.tensor([[0.9, 0.1]]).log()
    large, small = 0.9 * math.log(1.8), 0.1 * math.log(0.2)  # 0.529 and -0.161
    entry = generalized_jsd(student, teacher, plain(clip_mode="entry", clip=0.3))
    assert float(entry.per_token) == pytest.approx(0.3 + small)  # the negative one stays
    assert float(entry.clipped) == 0.5
    token = generalized_jsd(student, teacher, plain(clip_mode="token", clip=0.3))
    assert float(token.per_token) == pytest.approx(0.3)
    assert float(token.clipped) == 1
    whole = generalized_jsd(student, teacher, plain(clip_mode="token", clip=0.4))
    assert float(whole.per_token) == pytest.approx(large + small)
    assert float(whole.clipped) == 0


@given(seeds, specs)
@settings(max_examples=60, deadline=None)
def test_equals_reference(seed: int, spec: DivergenceSpec) -> None:
    student, teacher = logits(seed)
    found = generalized_jsd(student, teacher, spec)
    options = reference.Options(
        beta=spec.beta, temperature=spec.temperature, clip_mode=spec.clip_mode, clip=spec.clip,
        top_k=min(spec.top_k, 7),
    )  # fmt: skip
    for i in range(len(student)):
        value, clipped, entropy = reference.divergence(student[i], teacher[i], options)
        assert float(found.per_token[i]) == pytest.approx(float(value), abs=1e-9)
        assert float(found.clipped[i]) == pytest.approx(clipped)
        assert float(found.teacher_entropy[i]) == pytest.approx(entropy, abs=1e-9)


@given(seeds, st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_a_divergence(seed: int, beta: float) -> None:
    student, teacher = logits(seed)
    found = generalized_jsd(student, teacher, plain(beta=beta)).per_token
    assert (found > -1e-12).all()
    assert generalized_jsd(teacher, teacher, plain(beta=beta)).per_token.abs().max() < 1e-12
    # Exchanging the models is exchanging beta for 1 - beta.
    other = generalized_jsd(teacher, student, plain(beta=1 - beta)).per_token
    assert torch.allclose(found, other, atol=1e-10)
    # A constant added to the logits of a token is no change.
    shifted = generalized_jsd(student + 3, teacher - 2, plain(beta=beta)).per_token
    assert torch.allclose(found, shifted, atol=1e-10)


def test_excluded_entries_count_for_neither() -> None:
    student, teacher = logits(3)
    whole = generalized_jsd(student[:, :5], teacher[:, :5], plain(beta=0.5)).per_token
    student[:, 5:] = teacher[:, 5:] = -math.inf
    student.requires_grad_()
    found = generalized_jsd(student, teacher, plain(beta=0.5)).per_token
    assert torch.allclose(found, whole)
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", ["none", "entry", "token"])
def test_gradients_in_float64(beta: float, mode: str) -> None:
    student, teacher = logits(11)
    spec = DivergenceSpec(beta=beta, clip_mode=mode, clip=0.08)

    def loss(x: Tensor) -> Tensor:
        return generalized_jsd(x, teacher, spec).per_token

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_policy_gradient() -> None:
    student, teacher = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-0.5, -3.0])
    loss = policy_gradient_loss(student, teacher)
    assert loss.tolist() == [0.5, -2.0]  # -A log p_S: A = 0.5 and -1
    loss.sum().backward()
    assert student.grad.tolist() == [-0.5, 1.0]  # -A: raise where the teacher is surer


def chunked(rows, teacher_rows, weight, teacher_weight, spec, **settings):
    weights = settings.pop("token_weights", torch.ones(len(rows), dtype=rows.dtype))
    return chunked_divergence(rows, teacher_rows, weight, teacher_weight, weights, spec, **settings)


@given(seeds, specs, st.integers(1, 9), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_chunked_equals_whole(seed: int, spec: DivergenceSpec, chunk: int, padding: int) -> None:
    n, h, wide, v = 7, 3, 5, 9  # the teacher's hidden size may be another
    rows, teacher_rows = normal(seed, n, h).requires_grad_(), normal(seed + 1, n, wide)
    weight, teacher_weight = normal(seed + 2, v, h), normal(seed + 3, v, wide)
    weight.requires_grad_()
    token_weights = normal(seed + 4, n)
    real = v - padding
    whole = generalized_jsd(rows @ weight[:real].T, teacher_rows @ teacher_weight[:real].T, spec)
    expected = torch.autograd.grad((whole.per_token * token_weights).sum(), (rows, weight))
    found = chunked(
        rows, teacher_rows, weight, teacher_weight, spec,
        chunk_tokens=chunk, vocab_size=real, token_weights=token_weights,
    )  # fmt: skip
    assert torch.allclose(found.per_token, whole.per_token, atol=1e-9)
    assert torch.allclose(found.clipped, whole.clipped.double())
    assert torch.allclose(found.teacher_entropy, whole.teacher_entropy, atol=1e-9)
    options = reference.Options(
        beta=spec.beta, temperature=spec.temperature, top_k=min(spec.top_k, real)
    )
    both = rows.detach() @ weight[:real].detach().T, teacher_rows @ teacher_weight[:real].T
    seen = [observed(s, t, options) for s, t in zip(*both, strict=True)]
    assert found.student_entropy.tolist() == pytest.approx([e for e, _ in seen], abs=1e-9)
    assert found.agreement.tolist() == [same for _, same in seen]
    for ours, wanted in zip(torch.autograd.grad(found.loss, (rows, weight)), expected, strict=True):
        assert torch.allclose(ours, wanted, atol=1e-9)


def test_chunked_policy_gradient_equals_whole() -> None:
    rows, teacher_rows = normal(1, 6, 3).requires_grad_(), normal(2, 6, 3)
    weight, targets = normal(3, 8, 3).requires_grad_(), torch.tensor([0, 7, 3, 3, 1, 6])
    spec = DivergenceSpec(temperature=1.3)

    def logprobs(x: Tensor) -> Tensor:
        scores = (x @ weight.T / 1.3).log_softmax(-1)
        return scores.gather(1, targets[:, None])[:, 0]

    whole = policy_gradient_loss(logprobs(rows), logprobs(teacher_rows))
    expected = torch.autograd.grad(whole.sum(), (rows, weight))
    found = chunked(rows, teacher_rows, weight, weight, spec, chunk_tokens=4,
                    objective="policy_gradient", target_ids=targets)  # fmt: skip
    assert torch.allclose(found.per_token, whole)
    for ours, wanted in zip(torch.autograd.grad(found.loss, (rows, weight)), expected, strict=True):
        assert torch.allclose(ours, wanted)


@pytest.mark.parametrize("objective", ["jsd", "policy_gradient"])
def test_blocks_within_a_chunk_change_nothing(objective: str, monkeypatch) -> None:
    rows, weight = normal(1, 7, 3).requires_grad_(), normal(2, 9, 3).requires_grad_()
    teacher, targets = normal(3, 7, 3), torch.tensor([0, 8, 3, 3, 1, 6, 2])
    spec = DivergenceSpec(beta=0.3, clip=0.02, top_k=4)

    def result() -> list[Tensor]:
        found = chunked(rows, teacher, weight, weight, spec, chunk_tokens=5, target_ids=targets,
                        token_weights=normal(4, 7), objective=objective)  # fmt: skip
        return [*found, *torch.autograd.grad(found.loss, (rows, weight))]

    whole = result()
    monkeypatch.setitem(_BLOCK_BYTES, "cpu", 4 * 20)  # two rows a block
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(result(), whole, strict=True))


class _Alive(TorchDispatchMode):
    """``most``: how many tensors of at least ``entries`` were there at once."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self._entries, self._made, self.most = entries, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.numel() >= self._entries:
            self._made.append(weakref.ref(made))
            living = [x for x in (found() for found in self._made) if x is not None]
            self.most = max(self.most, len({x.untyped_storage().data_ptr() for x in living}))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_two_logits_of_a_chunk(dtype: torch.dtype, monkeypatch) -> None:
    """The student's and the teacher's; not those of the chunk before, nor their gradient."""
    monkeypatch.setitem(_BLOCK_BYTES, "cpu", 4 * 40)
    rows, teacher = (torch.randn(32, 4, dtype=dtype) for _ in range(2))
    weight = torch.randn(40, 4, dtype=dtype).requires_grad_()
    with _Alive(8 * 40) as alive:
        loss = chunked(rows.requires_grad_(), teacher, weight, weight, plain(), chunk_tokens=8).loss
        loss.backward()
    assert alive.most == 2


def _head_gradient(rows: Tensor, teacher: Tensor, weight: Tensor, chunk: int) -> Tensor:
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    chunked(rows, teacher, weight, weight, plain(), chunk_tokens=chunk).loss.backward()
    return weight.grad.double()


def test_the_heads_gradient_is_not_rounded_chunk_by_chunk(monkeypatch) -> None:
    """Against plain torch in float64, on the same bf16 numbers."""
    monkeypatch.setitem(_BLOCK_BYTES, "cpu", 4 * 40)
    rows, teacher, weight = (normal(i, n, 8).bfloat16() for i, n in ((1, 256), (2, 256), (3, 40)))
    exact = _head_gradient(rows.double(), teacher.double(), weight.double(), 256)
    error = (_head_gradient(rows, teacher, weight, 4) - exact).norm() / exact.norm()
    monkeypatch.setattr(chunked_module, "_wide_product", lambda left, right: left @ right)
    rounded = (_head_gradient(rows, teacher, weight, 4) - exact).norm() / exact.norm()
    assert error < rounded < 3e-3  # most of it is the logits' and the result's own rounding


def test_the_heads_gradient_adds_up_in_fp32() -> None:
    d_logits, rows = (normal(i, 64, n).bfloat16() for i, n in ((1, 40), (2, 8)))
    gradients = _Gradients(rows, torch.zeros(40, 8, dtype=torch.bfloat16), (False, True))
    for start in range(0, 64, 4):
        part = slice(start, start + 4)
        gradients.add(part, rows[part], d_logits[part])
    wanted = d_logits.double().T @ rows.double()
    assert (gradients.weight - wanted).abs().max() < 1e-5  # 3e-2 where each product is rounded


def test_the_heads_gradient_on_cuda_is_one_product_in_fp32() -> None:
    with FakeTensorMode():
        left, right = (
            torch.empty(*n, dtype=torch.bfloat16, device="cuda") for n in ((8, 4), (4, 6))
        )
        made = chunked_module._wide_product(left, right)
    assert (made.dtype, made.shape) == (torch.float32, (8, 6))


def test_backward_through_a_graph_that_is_kept_leaves_it_whole() -> None:
    rows, weight = normal(1, 4, 3).requires_grad_(), normal(2, 6, 3).requires_grad_()
    loss = 3 * chunked(rows, normal(3, 4, 3), weight, weight, plain()).loss
    first = torch.autograd.grad(loss, (rows, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (rows, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_chunked_gradcheck_and_no_tokens() -> None:
    rows, weight = normal(1, 3, 2).requires_grad_(), normal(2, 5, 2).requires_grad_()
    teacher, teacher_weight = normal(3, 3, 2), normal(4, 5, 2)

    def loss(r: Tensor, w: Tensor) -> Tensor:
        return chunked(r, teacher, w, teacher_weight, plain(beta=0.4), chunk_tokens=2).loss

    assert torch.autograd.gradcheck(loss, (rows, weight))
    nothing = chunked(rows[:0], teacher[:0], weight, weight, plain()).loss
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert weight.grad.abs().max() == 0


def test_bad_settings() -> None:
    for bad, message in (
        ({"beta": 1.5}, "beta 1.5"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"clip_mode": "hard"}, "clip_mode 'hard'"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"top_k": -1}, "top_k -1"),
    ):
        with pytest.raises(AssertionError, match=message):
            DivergenceSpec(**bad)
    x = torch.zeros(1, 2)
    with pytest.raises(AssertionError, match="needs target_ids"):
        chunked(x, x, x, x, plain(), objective="policy_gradient")
    with pytest.raises(KeyError, match="sft"):
        chunked(x, x, x, x, plain(), objective="sft")
    with pytest.raises(AssertionError, match="chunk_tokens 0"):
        chunked(x, x, x, x, plain(), chunk_tokens=0)
