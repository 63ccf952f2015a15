"""A global batch's loss, gradients and training steps, one sequence at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_phf.reference.hidden import PAIRS, flow_objective, named_terms, window
from megatron_phf.reference.model import aux_loss, by_file_name, load_model, run, trainable
from megatron_phf.reference.options import Options
from megatron_phf.reference.output_loss import (
    cross_entropy,
    divergence,
    importance,
    observed,
    sampled_token,
)
from megatron_phf.reference.weights import token_weights, weighted_terms


@dataclass
class Result:
    """Means over the global batch; gradients by HuggingFace name."""

    metrics: dict
    gradients: dict[str, Tensor] = field(default_factory=dict)


def sequence_terms(
    student: Any, teacher: Any, sample: dict, o: Options
) -> tuple[list, dict[str, list[Tensor] | None], list[Tensor]]:
    """(list of (loss, clipped, entropies, agreement, ratio, its clip), flow, routers) of a line."""
    response = sample["response_ids"]
    if isinstance(teacher, dict):
        teacher = teacher[_name(sample, teacher)]
    prompt, privileged = sample["student_prompt_ids"], sample["teacher_prompt_ids"]
    logits, hidden, routers = run(student, prompt + response)
    with torch.no_grad():
        teacher_logits, teacher_hidden, _ = run(teacher, privileged + response)
    # Vocabularies may be padded differently: what both have.
    common = min(logits.shape[1], teacher_logits.shape[1])
    logits, teacher_logits = logits[:, :common], teacher_logits[:, :common]
    # Tokens that the student did not write are read, and that is all.
    written = [i for i, m in enumerate(sample.get("response_mask") or [1] * len(response)) if m]
    written = [i for i in written if i >= o.skip_first_tokens]
    pairs = [(logits[len(prompt) - 1 + i], teacher_logits[len(privileged) - 1 + i])
             for i in written]  # fmt: skip
    tokens = []
    for i, pair in zip(written, pairs, strict=True):
        token = response[i]
        if o.objective == "jsd":
            values = divergence(*pair, o)
        elif o.objective == "cross_entropy":
            values = cross_entropy(*pair, token, o)
        else:
            values = sampled_token(*pair, token, o)
        ratio = (1.0, 0.0)
        if o.ratio_cap is not None:
            ratio = importance(pair[0], token, sample["log_probs"][i], o)
        tokens.append((values[0] * ratio[0], *values[1:], *observed(*pair, o), *ratio))
    chosen = window(len(written), o.window_size, o.window_rule)
    w = [written[i] for i in chosen]
    at, teacher_at = [len(prompt) + i for i in w], [len(privileged) + i for i in w]
    sides = [h[at] for h in hidden], [h[teacher_at] for h in teacher_hidden]
    if o.token_weighting == "none":
        return tokens, named_terms(*sides, o), routers
    weights = token_weights(pairs, o)
    tokens = [(x * loss, *rest) for x, (loss, *rest) in zip(weights, tokens, strict=True)]
    here = torch.tensor([weights[i] for i in chosen])
    return tokens, weighted_terms(*sides, here, o), routers


def _name(sample: dict, teachers: dict) -> str:
    """Of the teacher of a line: the first where it names none."""
    return sample.get("teacher") or next(iter(teachers))


def _by_teacher(samples: list[dict], losses: list[list[float]], teachers: dict) -> dict:
    """Mean divergence of the tokens that each teacher has read, and their number."""
    means, counts = {}, {}
    for name in teachers:
        own = [x for s, of in zip(samples, losses, strict=True) for x in of
               if _name(s, teachers) == name]  # fmt: skip
        means[name], counts[name] = (sum(own) / len(own) if own else None), len(own)
    return {"opsd_by_teacher": means, "rollout_tokens_by_teacher": counts}


def _mean(lists: list[list[Tensor] | None]) -> list[Tensor] | None:
    """Of one term over the samples, entry by entry."""
    known = [values for values in lists if values is not None]
    if len(known) < len(lists):
        return None
    return [torch.stack(column).mean() for column in zip(*known, strict=True)]


def objective(student: Any, teacher: Any, samples: list[dict], o: Options) -> tuple[Tensor, dict]:
    """The total loss of a global batch, with graph, and its metrics.

    ``teacher``: a model, or several by the names that lines have in ``teacher``.
    """
    tokens, flows, routers, losses = [], [], [], []
    for sample in samples:
        more, flow, logits = sequence_terms(student, teacher, sample, o)
        tokens += more
        losses.append([t[0].item() for t in more])
        flows.append(flow)
        routers.append(logits)
    opsd = sum(t[0] for t in tokens) / len(tokens)
    means = {name: _mean([flow[name] for flow in flows]) for name in flows[0]}
    flow = flow_objective(means, o)
    loss = o.opsd_weight * opsd + o.alpha * flow
    metrics = {
        "loss": loss.item(),
        "opsd": opsd.item(),
        "flow": flow.item(),
        "clipped_fraction": sum(t[1] for t in tokens) / len(tokens),
        "teacher_entropy": sum(t[2] for t in tokens) / len(tokens),
        "student_entropy": sum(t[3] for t in tokens) / len(tokens),
        "teacher_agreement": sum(t[4] for t in tokens) / len(tokens),
        "rollout_tokens": len(tokens),
    }
    if isinstance(teacher, dict):
        metrics |= _by_teacher(samples, losses, teacher)
    if o.ratio_cap is not None:
        metrics["importance_weight"] = sum(t[5] for t in tokens) / len(tokens)
        metrics["importance_clipped_fraction"] = sum(t[6] for t in tokens) / len(tokens)
    for name, values in means.items():
        by = "pair" if name in PAIRS else "layer"
        metrics[f"flow_{name}"] = torch.stack(values).mean().item() if values else None
        metrics[f"flow_{name}_per_{by}"] = None if values is None else [x.item() for x in values]
    if o.aux_coeff:
        balance = aux_loss(student, routers, o)
        metrics["moe_aux_loss"] = balance.mean().item()
        loss = loss + o.aux_coeff * balance.sum()
    return loss, metrics


def read_replay(path: str) -> list[dict]:
    """The lines of a replay file that are trained on."""
    with open(path) as f:
        lines = [json.loads(line) for line in f if line.strip()]
    return [line for line in lines if line.get("kept", True)]


def compute(
    directory: str,
    samples: list[dict],
    o: Options,
    dtype: torch.dtype = torch.float32,
    teacher_directory: str | dict[str, str] | None = None,
    adapter: str | None = None,
) -> Result:
    """Value of every metric and gradient of every trained parameter.

    The teacher has the same weights without the adapter, or is the model in
    ``teacher_directory``, or each line's of several there by name.
    """
    student = load_model(directory, dtype, adapter)
    if isinstance(teacher_directory, dict):
        teacher: Any = {name: load_model(d, dtype) for name, d in teacher_directory.items()}
    else:
        teacher = load_model(teacher_directory or directory, dtype)
    loss, metrics = objective(student, teacher, samples, o)
    loss.backward()
    gradients = by_file_name({n: p.grad for n, p in trainable(student).items()})
    metrics["grad_norm"] = float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5)
    return Result(metrics, gradients)


def train(
    directory: str,
    samples: list[dict],
    o: Options,
    steps: int,
    lr: float,
    eps: float,
    clip_grad: float,
    teacher_kind: str,
    ema_decay: float,
    adapter: str | None = None,
) -> tuple[list[dict], dict[str, Tensor]]:
    """``steps`` AdamW steps (no weight decay, constant rate), equal parts of ``samples`` each."""
    student = load_model(directory, adapter=adapter)
    teacher = load_model(directory, adapter=None if teacher_kind == "frozen" else adapter)
    weights = list(trainable(student).values())
    optimizer = torch.optim.AdamW(weights, lr=lr, eps=eps, weight_decay=0.0)
    size, history = len(samples) // steps, []
    for i in range(steps):
        if teacher_kind == "live":
            teacher.load_state_dict(student.state_dict())
        optimizer.zero_grad()
        loss, metrics = objective(student, teacher, samples[i * size : (i + 1) * size], o)
        loss.backward()
        # In fp64: torch's own norm loses digits of large tensors.
        norm = sum(p.grad.double().square().sum() for p in weights) ** 0.5
        torch.nn.utils.clip_grads_with_norm_(weights, clip_grad, norm)
        optimizer.step()
        if teacher_kind == "ema":
            with torch.no_grad():
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.mul_(ema_decay).add_(s, alpha=1 - ema_decay)
        history.append({**metrics, "grad_norm": float(norm)})
    return history, by_file_name({n: p.detach() for n, p in trainable(student).items()})
