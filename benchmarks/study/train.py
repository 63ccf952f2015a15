"""Runs of one method in lockstep: rollouts, loss, step and evaluation of all at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.model import Stack, forward, logits
from benchmarks.study.task import Problems, sample
from megatron_phf.losses import DivergenceSpec, FlowSpec, flow_loss, generalized_jsd

BATCH = 32
TEMPERATURE = 1.1
CLIP_GRAD = 1.0
_BETAS, _EPS = (0.9, 0.999), 1e-8
_TOGETHER = 4  # models a backward pass: more would leave the cache
_SAMPLED = 16  # models that sample together


@dataclass(frozen=True)
class Arm:
    """A method; the frozen teacher is the base model, shown what ``privileged`` says.

    ``stale``: how many updates old its rollouts are.
    """

    name: str
    alpha: float = 0.0
    terms: tuple[str, ...] = ("direction", "geometry", "adjacent")
    beta: float = 0.5
    opsd_weight: float = 1.0
    privileged: str = "solution"
    stale: int = 0


@dataclass(frozen=True)
class Run:
    """``base``: which of the base models; ``seed``: of problems and samples."""

    base: int
    seed: int
    lr: float
    warmup: int = 0


@dataclass
class Curve:
    """What a run has left; ``correct``: by step, whether each held-out problem was solved."""

    run: Run
    correct: dict[int, list[bool]] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)


def learning_rate(run: Run, done: int, steps: int) -> float:
    """Megatron-LM's linear warm-up and cosine after ``done`` steps."""
    if done <= run.warmup and run.warmup:
        return run.lr * done / run.warmup
    return run.lr * 0.5 * (1 + math.cos(math.pi * (done - run.warmup) / (steps - run.warmup)))


class AdamW:
    """torch.optim.AdamW without weight decay on [M, P], a rate and a clipped norm each row."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._steps = flat, 0
        self._mean, self._square = torch.zeros_like(flat), torch.zeros_like(flat)

    def step(self, gradient: Tensor, rates: Tensor) -> Tensor:
        """Update in place; the norms [M] before they are clipped."""
        self._steps += 1
        norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)
        gradient *= (CLIP_GRAD / (norms + 1e-6)).clamp(max=1).float()[:, None]
        for moment, value, beta in zip(
            (self._mean, self._square), (gradient, gradient.square()), _BETAS, strict=True
        ):
            moment.lerp_(value, 1 - beta)
        corrections = [1 - beta**self._steps for beta in _BETAS]
        root = self._square.sqrt().div_(math.sqrt(corrections[1])).add_(_EPS)
        self._flat -= (rates / corrections[0])[:, None] * self._mean / root
        return norms


def run_states(models: Stack, prompts: Tensor, responses: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [M, b n, v] that predict the responses [M, b, n], and each layer's states at them."""
    p, n = prompts.shape[-1], responses.shape[-1]
    last, states = forward(models, torch.cat([prompts, responses], -1))
    scored = last[:, :, p - 1 : p + n - 1].flatten(1, 2)
    return logits(models, scored), [x[:, :, p:] for x in states]


def distillation_loss(
    arm: Arm,
    models: tuple[Stack, Stack],
    prompts: tuple[Tensor, Tensor],
    responses: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, float]:
    """The sum of the models' losses, the output loss of each [M], their mean flow loss.

    ``models`` and ``prompts``: the students' and the teachers'.
    """
    responses = responses[:, :, : int(lengths.max())]
    valid = torch.arange(responses.shape[-1]) < lengths[..., None]
    own, states = run_states(models[0], prompts[0], responses)
    with torch.no_grad():
        other, teacher_states = run_states(models[1], prompts[1], responses)
    spec = DivergenceSpec(beta=arm.beta, temperature=TEMPERATURE, clip_mode="none")
    token = generalized_jsd(own.flatten(0, 1), other.flatten(0, 1), spec).per_token
    token = token.view(valid.shape).where(valid, 0.0)
    opsd = token.sum((1, 2)) / valid.sum((1, 2))
    if not arm.alpha:
        return opsd.sum() * arm.opsd_weight, opsd.detach(), 0.0
    both = ([x.flatten(0, 1) for x in side] for side in (states, teacher_states))
    flow = flow_loss(*both, valid.flatten(0, 1), spec=FlowSpec(arm.terms)).loss
    loss = arm.opsd_weight * opsd.sum() + arm.alpha * len(models[0]) * flow
    return loss, opsd.detach(), float(flow.detach())


def supervised_loss(student: Stack, prompts: Tensor, reference: Tensor) -> Tensor:
    """Cross-entropy of each model [M] on the reference solutions [M, b, n]."""
    own, _ = run_states(student, prompts, reference)
    token = F.cross_entropy(own.flatten(0, 1), reference.flatten(), reduction="none")
    return token.view(len(student), -1).mean(1)


@torch.no_grad()
def solved(flat: Tensor, config: Mapping[str, Any], heldout: Problems) -> Tensor:
    """Which held-out problems each model [M, P] solves in one sample at temperature 1: [M, n].

    All meet the same uniform numbers.
    """
    n = len(heldout.student)
    uniforms = torch.rand(n, heldout.limit, generator=torch.Generator().manual_seed(999))
    found = []
    for part in flat.split(_TOGETHER):
        models = Stack(config, part)
        prompts = heldout.student.expand(len(part), -1, -1)
        responses, _ = sample(models, prompts, uniforms.expand(len(part), -1, -1))
        found.append(heldout.correct(responses, torch.arange(n).expand(len(part), -1)))
    return torch.cat(found)


class Lockstep:
    """Runs of ``arm`` on ``bases`` [B, P], all steps of all of them together."""

    def __init__(
        self,
        config: Mapping[str, Any],
        bases: Tensor,
        arm: Arm,
        runs: Sequence[Run],
        train: Problems,
        steps: int,
    ) -> None:
        self._config, self._arm, self._steps, self._train = config, arm, steps, train
        self.curves = [Curve(run) for run in runs]
        self.flat = bases[[run.base for run in runs]].clone()
        self._teachers = bases[[run.base for run in runs]]
        self._prompts = train.student, train.teacher(arm.privileged)
        parts = list(zip(*(x.split(_TOGETHER) for x in (self.flat, self._teachers)), strict=True))
        self._parts = [
            (Stack(config, own, trainable=True), Stack(config, other), AdamW(own))
            for own, other in parts
        ]
        self._ahead: deque[tuple[Tensor, Tensor, Tensor]] = deque()
        self._sampled = 0

    def _sample(self) -> None:
        """The next step's rollouts, by the weights of now; they depend on run and step alone."""
        runs = [curve.run for curve in self.curves]
        draws = [torch.Generator().manual_seed(r.seed * 100_003 + self._sampled) for r in runs]
        count, limit = len(self._train.student), self._train.limit
        index = torch.stack([torch.randperm(count, generator=g)[:BATCH] for g in draws])
        uniforms = torch.stack([torch.rand(BATCH, limit, generator=g) for g in draws])
        found = [
            sample(Stack(self._config, flat), self._prompts[0][at], u, TEMPERATURE)
            for flat, at, u in zip(
                *(x.split(_SAMPLED) for x in (self.flat, index, uniforms)), strict=True
            )
        ]
        responses, lengths = (torch.cat(parts) for parts in zip(*found, strict=True))
        self._ahead.append((index, responses, lengths))
        self._sampled += 1

    def step(self, done: int) -> None:
        """Step ``done`` + 1 of every run."""
        while self._sampled < min(done + self._arm.stale + 1, self._steps):
            self._sample()
        index, responses, lengths = self._ahead.popleft()
        self.train_on(done, index, responses, lengths)

    def train_on(self, done: int, index: Tensor, responses: Tensor, lengths: Tensor) -> None:
        """One update on responses [M, b, n] to the problems ``index`` [M, b]."""
        for i, (student, teacher, optimizer) in enumerate(self._parts):
            rows = slice(i * _TOGETHER, i * _TOGETHER + len(student))
            prompts = self._prompts[0][index[rows]], self._prompts[1][index[rows]]
            loss, opsd, flow = distillation_loss(
                self._arm, (student, teacher), prompts, responses[rows], lengths[rows]
            )
            curves = self.curves[rows]
            rates = [learning_rate(curve.run, done, self._steps) for curve in curves]
            norms = optimizer.step(student.gradient(loss), torch.tensor(rates))
            means = lengths[rows].float().mean(1)
            for curve, *values in zip(curves, opsd, norms, means, rates, strict=True):
                names = ("opsd", "grad_norm", "response_length", "learning_rate")
                line = {name: float(value) for name, value in zip(names, values, strict=True)}
                curve.metrics.append({"step": done + 1, **line, "flow": flow})

    def look(self, done: int, heldout: Problems) -> None:
        """Evaluate every run after ``done`` steps."""
        for curve, right in zip(self.curves, solved(self.flat, self._config, heldout), strict=True):
            curve.correct[done] = right.tolist()
