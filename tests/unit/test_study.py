"""The studies' batched models and steps: equal to transformers, the reference and torch's AdamW."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.study import model as batched
from benchmarks.study.studies import STUDIES
from benchmarks.study.task import END, TASKS, Problems, any_order, sample
from benchmarks.study.train import (
    TEMPERATURE,
    AdamW,
    Arm,
    Lockstep,
    Run,
    distillation_loss,
    learning_rate,
)
from megatron_phf.demo.task import MODEL_CONFIG, make_hf_directory
from megatron_phf.reference.method import compute
from megatron_phf.reference.model import load_model
from megatron_phf.reference.options import Options


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two directories; their random weights are larger than usual, so that nothing is near 0."""
    paths = []
    for seed in range(2):
        path = tmp_path_factory.mktemp(f"model{seed}")
        make_hf_directory(str(path), seed)
        file = path / "model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        noisy = {
            name: x + 0.08 * torch.randn(x.shape, generator=generator)
            for name, x in load_file(file).items()
        }
        save_file(noisy, file, {"format": "pt"})
        paths.append(str(path))
    return paths


def _rows(paths: list[str]) -> torch.Tensor:
    tensors = [load_file(Path(path) / "model.safetensors") for path in paths]
    return torch.stack([batched.from_hf(MODEL_CONFIG, t) for t in tensors])


def test_a_model_is_transformers_and_so_is_its_gradient(models: list[str]) -> None:
    stack = batched.Stack(MODEL_CONFIG, _rows(models), trainable=True)
    # Not 0: transformers gives the padding token's embedding no gradient.
    ids = torch.randint(1, 32, (2, 3, 17), generator=torch.Generator().manual_seed(0))
    last, _ = batched.forward(stack, ids)
    ours = batched.logits(stack, last.flatten(1, 2)).view(2, 3, 17, -1)
    gradient = stack.gradient((ours * torch.linspace(-1, 1, ours.numel()).view_as(ours)).sum())
    weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    for i, path in enumerate(models):
        theirs = load_model(path)
        logits = theirs(ids[i]).logits
        torch.testing.assert_close(ours[i], logits, atol=2e-5, rtol=2e-5)
        (logits * weight[i]).sum().backward()
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        expected_row = batched.from_hf(MODEL_CONFIG, expected)
        torch.testing.assert_close(gradient[i], expected_row, atol=1e-3, rtol=1e-4)
        back = batched.to_hf(MODEL_CONFIG, stack.flat[i])
        assert all(torch.equal(back[n], p) for n, p in theirs.named_parameters())


def test_samples_are_those_of_the_whole_forward_pass(models: list[str]) -> None:
    """Each token where the cumulative distribution passes its uniform number; they end with END."""
    stack = batched.Stack(MODEL_CONFIG, _rows(models))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, 32, (2, 40, 6), generator=generator)
    uniforms = torch.rand(2, 40, 12, generator=generator)
    tokens, lengths = sample(stack, prompts, uniforms, temperature=0.7)
    last, _ = batched.forward(stack, torch.cat([prompts, tokens], -1))
    logits = batched.logits(stack, last.flatten(1, 2)).view(2, 40, 18, -1)[:, :, 5:17]
    cumulative = (logits / 0.7).softmax(-1).cumsum(-1)
    expected = (cumulative <= uniforms[..., None]).sum(-1)
    written = torch.arange(12) < lengths[..., None]
    assert torch.equal(tokens[written], expected.clamp(max=31)[written])
    ended = lengths < 12
    assert 5 < ended.sum() < 75
    assert (tokens.gather(-1, lengths[..., None] - 1)[..., 0] == END)[ended].all()
    assert ((tokens == END).sum(-1) <= 1).all()


def _arms() -> list[Arm]:
    """Every loss of the studies once."""
    arms = [arm for study in STUDIES.values() for arm in study.arms]
    losses = {(a.alpha, a.terms, a.beta, a.opsd_weight): a for a in reversed(arms)}
    return list(losses.values())


@pytest.mark.parametrize("arm", _arms(), ids=lambda arm: arm.name)
def test_a_loss_and_its_gradient_are_the_references(arm: Arm, models: list[str]) -> None:
    """Responses of several lengths; the first model's teacher is the second, and the other way."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randint(1, 32, shape, generator=generator)  # noqa: E731
    prompts, responses = (draw(2, 3, 4), draw(2, 3, 6)), draw(2, 3, 7)
    lengths = torch.tensor([[7, 4, 2], [5, 1, 7]])
    student = batched.Stack(MODEL_CONFIG, _rows(models), trainable=True)
    teacher = batched.Stack(MODEL_CONFIG, _rows(models[::-1]))
    loss, opsd, _ = distillation_loss(arm, (student, teacher), prompts, responses, lengths)
    gradient = student.gradient(loss)
    total = 0.0
    options = Options(
        alpha=arm.alpha, beta=arm.beta, temperature=TEMPERATURE, clip_mode="none",
        opsd_weight=arm.opsd_weight, terms=",".join(arm.terms),
    )  # fmt: skip
    for i, path in enumerate(models):
        samples = [
            {
                "student_prompt_ids": prompts[0][i, j].tolist(),
                "teacher_prompt_ids": prompts[1][i, j].tolist(),
                "response_ids": responses[i, j, : lengths[i, j]].tolist(),
            }
            for j in range(3)
        ]
        found = compute(path, samples, options, teacher_directory=models[1 - i])
        assert float(opsd[i]) == pytest.approx(found.metrics["opsd"], rel=1e-5)
        total += found.metrics["loss"]
        row = batched.from_hf(MODEL_CONFIG, found.gradients)
        torch.testing.assert_close(gradient[i], row, atol=2e-5, rtol=1e-3)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_each_row_is_stepped_as_by_torch() -> None:
    """Other rates, other norms: one below the clipping's, one above."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(2, 50, generator=generator)
    theirs = [torch.nn.Parameter(row.clone()) for row in flat]
    rates = [0.01, 0.03]
    optimizers = [
        torch.optim.AdamW([p], lr=lr, weight_decay=0.0) for p, lr in zip(theirs, rates, strict=True)
    ]
    ours = AdamW(flat)
    for _ in range(3):
        gradient = torch.randn(2, 50, generator=generator) * torch.tensor([[0.05], [2.0]])
        norms = gradient.norm(dim=1)
        for p, row, optimizer in zip(theirs, gradient, optimizers, strict=True):
            p.grad = row.clone()
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
        torch.testing.assert_close(ours.step(gradient, torch.tensor(rates)).float(), norms)
    torch.testing.assert_close(flat, torch.stack([p.detach() for p in theirs]))


def test_learning_rate_is_megatrons() -> None:
    found = [
        learning_rate(Run(0, 0, 1.0, warmup), done, 100)
        for warmup in (0, 20)
        for done in (0, 10, 20, 60)
    ]
    expected = [1, 0.9755282581, 0.9045084972, 0.3454915028, 0, 0.5, 1, 0.5]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("problem", ["9-3+4", "1-2-3+4-5", "7+8-9"])
def test_a_solution_in_any_order_is_right(problem: str) -> None:
    generator = random.Random(0)
    texts = {any_order(problem, generator) for _ in range(50)}
    assert len(texts) > 1
    for text in texts:
        *lines, box = text.split(";")
        for line in lines:
            sum_, value = line.split("=")
            assert eval(sum_) % 10 == int(value)  # digits and signs, made above
        assert box == f"\\boxed{{{eval(problem) % 10}}}"


def test_answers_are_read_behind_the_last_box() -> None:
    heldout = Problems(TASKS["two"], "heldout", 3)
    right = heldout.reference[[0, 0, 0, 0, 1]].clone()
    box = right.shape[1] - 4
    right[1, box + 1] = 4 + (right[1, box + 1] - 3) % 10  # another digit
    right[2, box] = 4  # no box
    right[3, box + 2] = 4  # not closed
    index = torch.tensor([[0, 0, 0, 0, 1]])
    assert heldout.correct(right[None], index).tolist() == [[True, False, False, False, True]]


def test_stale_rollouts_are_sampled_by_weights_of_that_many_updates_before() -> None:
    """At a rate of 0 nothing moves; what step 4 trains on is what step 2's weights sampled."""
    train = Problems(TASKS["two"], "train", 100)
    bases = batched.initial(MODEL_CONFIG, [0])
    seen: dict[int, list[torch.Tensor]] = {}
    for stale in (0, 2):
        group = Lockstep(MODEL_CONFIG, bases, Arm("a", stale=stale), [Run(0, 0, 3e-2)], train, 5)
        rows = seen.setdefault(stale, [])
        group.train_on = lambda done, index, responses, lengths, rows=rows: rows.append(responses)  # type: ignore[method-assign]
        for done in range(5):
            group.flat[:] = bases + done  # other weights, so other samples
            group.step(done)
    assert torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[0][3], seen[2][3])
