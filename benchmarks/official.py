"""A stand-in for an optimizer step of the official OPSD trainer, in PyTorch and transformers.

From reading github.com/siyan-zhao/OPSD (opsd_trainer.py, scripts/run_opsd*.sh), without its code.

Kept, microbatch by microbatch: rollouts by ``generate`` with the KV cache, of that microbatch
alone, gradient checkpointing off meanwhile; the student's logits of prompt and response; its
entropy by a softmax of its own; the teacher's logits of prompt and response, with the adapters off
(LoRA) or with the current weights (all weights trained); its entropy; the generalised
Jensen-Shannon divergence on whole logits in their dtype with a mixture of stacked log
probabilities; the clamp of each entry; backward.  Then the gradient norm's clip and fused AdamW.
The scripts' settings: gradient checkpointing, LoRA rank 64 and alpha 128 on seven linears, beta
0.5, temperature 1.1, clamp 0.05, top-p 0.95, top-k 20, 2 rollouts a microbatch, 2 microbatches.

Left out: vLLM, DeepSpeed ZeRO-3 with its offload, flash-attn 2 (transformers' fused attention takes
its place), decoding to text and logging, Trainer's own bookkeeping.  All of it would cost it time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_phf.train.metrics import PhaseTimer

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAMPLING = {"temperature": 1.1, "top_p": 0.95, "top_k": 20}


@dataclass(frozen=True)
class Settings:
    """The scripts' hyperparameters; ``lora_rank`` 0 trains all weights."""

    lora_rank: int = 64
    lora_alpha: float = 128.0
    beta: float = 0.5
    temperature: float = 1.1
    clip: float = 0.05
    lr: float = 2e-4
    max_grad_norm: float = 1.0
    micro_batch: int = 2
    checkpointing: bool = True


@dataclass(frozen=True)
class Batch:
    """One optimizer step's prompts [b, p] and [b, q], without padding."""

    student: Tensor
    teacher: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """Microbatches of ``size`` rollouts."""
        parts = zip(self.student.split(size), self.teacher.split(size), strict=True)
        return (Batch(*part) for part in parts)


def divergence(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    """Logits [b, s, v] of both -> the mean over tokens, each the sum of its clamped entries."""
    log_s, log_t = ((x / settings.temperature).log_softmax(-1) for x in (student, teacher))
    beta = settings.beta
    if beta in (0, 1):
        log_m, target = (log_s, log_t) if beta == 0 else (log_t, log_s)
        terms = F.kl_div(log_m, target, reduction="none", log_target=True)
    else:
        parts = torch.stack((log_s + math.log1p(-beta), log_t + math.log(beta)))
        log_m = torch.logsumexp(parts, dim=0)
        of_teacher, of_student = (
            F.kl_div(log_m, x, reduction="none", log_target=True) for x in (log_t, log_s)
        )
        terms = beta * of_teacher + (1 - beta) * of_student
    scored = torch.ones(terms.shape[:2], dtype=torch.bool, device=terms.device)
    return terms.clamp(max=settings.clip)[scored].sum() / scored.sum()


@torch.no_grad()
def _entropy(logits: Tensor, temperature: float) -> float:
    """Mean over tokens, as the trainer logs it."""
    log_p = (logits / temperature).log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


class OfficialTrainer:
    """Model, optimizer and the step."""

    def __init__(self, directory: str, settings: Settings, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.settings = settings
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        self.model = self._with_adapters(model) if settings.lora_rank else model
        self.model.train()
        self._checkpointing(settings.checkpointing)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)

    def _with_adapters(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.settings.lora_rank,
            lora_alpha=self.settings.lora_alpha,
            target_modules=list(MODULES),
            task_type="CAUSAL_LM",
        )
        model.enable_input_require_grads()  # or checkpoints of frozen layers get no gradient
        return get_peft_model(model, config)

    def _checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()

    def generate(self, prompts: Tensor, new_tokens: int) -> Tensor:
        """prompts [b, p] -> responses [b, new_tokens]; nobody stops early."""
        self._checkpointing(False)
        with torch.no_grad():
            found = self.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                do_sample=True,
                use_cache=True,
                **SAMPLING,
            )
        self._checkpointing(self.settings.checkpointing)
        return found[:, prompts.shape[1] :]

    def _logits(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """A view [b, n, v] of the logits of the whole sequence: what predicts the response."""
        tokens = torch.cat((prompts, responses), dim=1)
        mask = torch.ones_like(tokens)
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits[:, prompts.shape[1] - 1 : -1]

    @torch.no_grad()
    def _teacher_logits(self, prompts: Tensor, responses: Tensor) -> Tensor:
        if not self.settings.lora_rank:
            return self._logits(prompts, responses)
        with self.model.disable_adapter():
            return self._logits(prompts, responses)

    def _micro_step(
        self, batch: Batch, responses: Tensor, share: float, timer: PhaseTimer
    ) -> float:
        """Forward and backward of one microbatch; its loss."""
        temperature = self.settings.temperature
        with timer.phase("student"):
            student = self._logits(batch.student, responses)
            _entropy(student.detach(), temperature)
        with timer.phase("teacher"):
            teacher = self._teacher_logits(batch.teacher, responses)
            _entropy(teacher, temperature)
        with timer.phase("student"):
            loss = divergence(student, teacher, self.settings)
            del student, teacher
            (loss * share).backward()
        return float(loss.detach())

    def step(self, batch: Batch, responses: Tensor | int, timer: PhaseTimer) -> float:
        """One optimizer step on ``responses`` [b, n], or on so many new tokens; its loss."""
        size = self.settings.micro_batch
        share = size / len(batch.student)
        losses = []
        for index, part in enumerate(batch.split(size)):
            if isinstance(responses, int):
                with timer.phase("rollout"):
                    given = self.generate(part.student, responses)
            else:
                given = responses[index * size :][:size]
            losses.append(self._micro_step(part, given, share, timer))
        with timer.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return sum(losses) / len(losses)
