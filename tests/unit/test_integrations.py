"""examples/integrations: their losses and gradients are the reference's, and their loops run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from megatron_phf import reference
from megatron_phf.demo.task import make_hf_directory, make_tokenizer
from tests.launch import REPO
from tests.models import make_model, make_replay

FOLDER = REPO / "examples/integrations"
OPTIONS = reference.Options(alpha=0.5)
# One length each pair: a mean over microbatches is then the mean over all.
LENGTHS = [9, 5, 9, 5]


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Any:
    """The examples import each other as scripts in one folder do."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("integrations")
    make_model(str(path / "hf"), eos_token_id=249)
    make_replay(str(path / "replay.jsonl"), LENGTHS)
    return path


@pytest.fixture(scope="module")
def expected(directory: Path) -> reference.Result:
    samples = reference.read_replay(str(directory / "replay.jsonl"))
    return reference.compute(str(directory / "hf"), samples, OPTIONS)


def columns(directory: Path) -> list[list[list[int]]]:
    samples = reference.read_replay(str(directory / "replay.jsonl"))
    names = "student_prompt_ids", "teacher_prompt_ids", "response_ids"
    return [[sample[name] for sample in samples] for name in names]


def assert_gradients(found: dict[str, Tensor], expected: reference.Result) -> None:
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= 1e-4 * scale + 1e-7, name


def test_under_sixty_lines() -> None:
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path


def test_plain_pytorch(directory: Path, expected: reference.Result) -> None:
    """The batch is padded; the reference goes one sequence at a time."""
    from plain_pytorch import phf_loss

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
        for _ in range(2)
    )
    loss = phf_loss(student, teacher, *columns(directory), alpha=OPTIONS.alpha)
    loss.backward()
    assert loss.item() == pytest.approx(expected.metrics["loss"], rel=1e-5)
    assert_gradients({n: p.grad for n, p in student.named_parameters()}, expected)
    assert all(p.grad is None for p in teacher.parameters())


def test_plain_pytorch_under_ddp(
    directory: Path, expected: reference.Result, tmp_path: Path
) -> None:
    """Its reducer only works on a module that is called itself."""
    from plain_pytorch import phf_loss

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
        for _ in range(2)
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped, called = DistributedDataParallel(student), []
        wrapped.register_forward_pre_hook(lambda *arguments: called.append(1))
        phf_loss(wrapped, teacher, *columns(directory), alpha=OPTIONS.alpha).backward()
    finally:
        dist.destroy_process_group()
    assert called
    assert_gradients({n: p.grad for n, p in student.named_parameters()}, expected)


def test_the_plain_loop_learns(tmp_path: Path) -> None:
    """On its own rollouts: they end at the stop token, and the divergence falls."""
    from plain_pytorch import sample, train

    torch.manual_seed(0)
    make_hf_directory(str(tmp_path / "hf"), seed=1)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    teacher = copy.deepcopy(student).eval()
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    prompts = [tokenizer(f"{i}+3=")["input_ids"] for i in range(8)]
    privileged = [tokenizer(f"{i}+3|{i}={i + 3}")["input_ids"] for i in range(8)]
    responses = sample(student, prompts[:3], eos, max_new_tokens=60, top_k=0)
    for response in responses:
        assert eos not in response[:-1] and (response[-1] == eos or len(response) == 60)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    batches = [(prompts, privileged)] * 12
    losses = list(train(student, teacher, batches, eos, optimizer, max_new_tokens=16))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def make_trainer(directory: Path, rows: list[dict], **settings: Any) -> Any:
    from trl_trainer import PHFTrainer

    args = SFTConfig(
        output_dir=str(directory / "trl"), max_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1.0, lr_scheduler_type="constant", bf16=False,
        optim="sgd", max_grad_norm=0, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    return PHFTrainer(
        model,
        args,
        alpha=OPTIONS.alpha,
        max_new_tokens=6,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )


def test_trl_trainer(
    directory: Path, expected: reference.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of SGD with rate 1 over two accumulated microbatches moves by the gradient."""
    student, privileged, responses = columns(directory)
    rows = [
        {"student_prompt_ids": s, "teacher_prompt_ids": t}
        for s, t in zip(student, privileged, strict=True)
    ]
    known = {tuple(s): r for s, r in zip(student, responses, strict=True)}
    trainer = make_trainer(directory, rows)
    monkeypatch.setattr(
        trainer, "responses", lambda model, prompts: [known[tuple(p)] for p in prompts]
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    result = trainer.train()
    assert trainer.model.training and not trainer.teacher.training
    after = dict(trainer.model.named_parameters())
    moved = {name: before[name] - after[name].detach() for name in before}
    assert_gradients(moved, expected)
    assert result.training_loss == pytest.approx(expected.metrics["loss"], rel=1e-4)
    for name, weight in trainer.teacher.named_parameters():
        assert torch.equal(weight, before[name])


def test_trl_trainer_samples(directory: Path) -> None:
    """Its own rollouts, as long as it was told."""
    rows = [{"student_prompt_ids": [3, 4, i], "teacher_prompt_ids": [5, 6, 7, i]} for i in range(4)]
    trainer = make_trainer(directory, rows)
    responses = trainer.responses(trainer.model.eval(), [[3, 4, 5], [6]])
    assert all(1 <= len(r) <= 6 for r in responses)
    assert trainer.train().training_loss >= 0
