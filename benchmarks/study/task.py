"""Arithmetic tasks of the embedded kind as tensors: prompts of one length, references, answers."""

from __future__ import annotations

import dataclasses
import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.study.model import Stack, forward, logits, new_cache
from megatron_phf.data.privileged import KINDS
from megatron_phf.data.problems import Problem
from megatron_phf.demo.task import ARITHMETIC_TEMPLATES, make_problems, make_tokenizer

VOCABULARY = make_tokenizer().get_vocab()
END, PAD, BOX, CLOSE = (VOCABULARY[t] for t in ("<|end|>", "<|pad|>", "\\boxed{", "}"))
_MORE = 4  # tokens that a response may have beyond the reference's


@dataclass(frozen=True)
class Task:
    """``several``: a sum's operations may be taken in any order, so that many texts are right."""

    name: str
    operations: int
    several: bool = False


TASKS = {t.name: t for t in (Task("two", 2), Task("two_orders", 2, True), Task("five", 5))}


def any_order(problem: str, generator: random.Random) -> str:
    """A worked solution that takes the operations in an order of its own.

    Behind a minus sign the sign between two numbers turns: 9-3+4 is 9-(3-4).
    """
    numbers = [int(digit) for digit in problem[::2]]
    signs = list(problem[1::2])
    text = ""
    while signs:
        i = generator.randrange(len(signs))
        turned = i > 0 and signs[i - 1] == "-"
        sign = signs[i] if not turned else {"+": "-", "-": "+"}[signs[i]]
        a, b = numbers[i], numbers[i + 1]
        value = (a + b if sign == "+" else a - b) % 10
        text += f"{a}{sign}{b}={value};"
        numbers[i : i + 2], signs[i : i + 1] = [value], []
    return f"{text}\\boxed{{{numbers[0]}}}"


def _problems(task: Task, split: str, count: int, seed: int) -> list[Problem]:
    problems = make_problems(split, count, seed, task.operations)
    if not task.several:
        return problems
    generator = random.Random(f"order {split} {seed}")
    return [dataclasses.replace(p, solution=any_order(p.problem, generator)) for p in problems]


def _ids(texts: list[str], end: bool = False) -> Tensor:
    """One token a character; [n, t]: all texts of a task are of one length."""
    pieces = (re.findall(r"<\|\w+\|>|\\boxed\{|.", text) for text in texts)
    rows = [[VOCABULARY[piece] for piece in row] + [END] * end for row in pieces]
    return torch.tensor(rows)


def _asked(texts: list[str]) -> Tensor:
    return _ids([f"<|user|>{text}<|assistant|>" for text in texts])


class Problems:
    """A split of a task; ``teacher`` by kind of --privileged."""

    def __init__(self, task: Task, split: str, count: int, seed: int = 0) -> None:
        problems = _problems(task, split, count, seed)
        texts = [p.problem for p in problems]
        self.student = _asked([ARITHMETIC_TEMPLATES.student.format(problem=t) for t in texts])
        self.reference = _ids([p.solution for p in problems], end=True)
        self.answer = torch.tensor([VOCABULARY[str(p.answer)] for p in problems])
        self.limit = self.reference.shape[1] + _MORE
        self._problems, self._seed = problems, seed

    def teacher(self, kind: str) -> Tensor:
        """Its prompts [n, t] where it is shown what ``kind`` says."""
        texts = KINDS[kind].texts
        if texts is None:
            return self.student
        shown = zip(self._problems, texts(self._problems, self._seed), strict=True)
        template = ARITHMETIC_TEMPLATES.teacher
        return _asked([template.format(problem=p.problem, solution=text) for p, text in shown])

    def correct(self, responses: Tensor, index: Tensor) -> Tensor:
        """Responses [..., n] to the problems ``index`` [...] -> whether the last box is right."""
        n = responses.shape[-1]
        place = torch.arange(n).where(responses == BOX, -1).amax(-1)
        inside, behind = (
            responses.gather(-1, (place + i).clamp(0, n - 1)[..., None])[..., 0] for i in (1, 2)
        )
        found = (place >= 0) & (place + 2 < n)
        return found & (inside == self.answer[index]) & (behind == CLOSE)


@torch.no_grad()
def sample(
    models: Stack, prompts: Tensor, uniforms: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """prompts [M, b, p], uniform numbers [M, b, n] -> responses [M, b, n], their lengths [M, b].

    The end token counts; what is behind it is padding.
    """
    m, b, p = prompts.shape
    n = uniforms.shape[-1]
    cache = new_cache(models, b, p + n)
    last = forward(models, prompts, cache)[0][:, :, -1]
    tokens = torch.full((m, b, n), PAD)
    going = torch.ones(m, b, dtype=torch.bool)
    for t in range(n):
        steps = (logits(models, last) / temperature).softmax(-1).cumsum(-1)
        chosen = torch.searchsorted(steps, uniforms[:, :, t, None] * steps[..., -1:], right=True)
        chosen = chosen[..., 0].clamp(max=len(VOCABULARY) - 1)
        tokens[:, :, t] = chosen.where(going, PAD)
        going &= chosen != END
        if not going.any() or t + 1 == n:
            break
        last = forward(models, tokens[:, :, t, None], cache, p + t)[0][:, :, 0]
    ended = (tokens == END).any(-1)
    return tokens, (tokens == END).int().argmax(-1).where(ended, n - 1) + 1
