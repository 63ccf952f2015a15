"""OPSD + PHF in plain PyTorch and transformers: what the product must equal.

One process, one sequence at a time, no padding, autograd for every gradient, hidden states by
hooks on HuggingFace's own layers.  Shares no code with megatron_phf and imports nothing of it.

    python tests/reference.py --hf-model DIR --replay-file F.jsonl --alpha 0.05
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Options:
    """The method's settings; ``clip_mode`` entry, token or none."""

    alpha: float = 0.05
    beta: float = 0.0
    temperature: float = 1.1
    clip_mode: str = "entry"
    clip: float = 0.05
    top_k: int = 0
    window_size: int = 128
    window_rule: str = "even"
    objective: str = "jsd"
    layer_map: tuple[int, ...] | None = None  # None: by relative depth
    terms: str = "direction,geometry,adjacent"  # of the flow loss; name or name=weight each
    layers: tuple[int, ...] | None = None  # in the flow loss; None: all
    aux_coeff: float = 0.0  # of the routers' load-balancing loss
    micro_batch_size: int = 1  # over which it is computed


@dataclass
class Result:
    """Means over the global batch; gradients by HuggingFace name."""

    metrics: dict
    gradients: dict[str, Tensor] = field(default_factory=dict)


def load_model(directory: str, dtype: torch.dtype = torch.float32, adapter: str | None = None):
    """The model with transformers' eager attention, in eval mode; peft adds the adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    if adapter is not None:
        from peft import PeftModel  # only where it is needed: tools/parity.py does without

        model = PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False
        )
    return model.eval()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """What an optimizer gets: of a model with an adapter, the adapter, as peft names it on disk."""
    return {
        name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad
    }


def run(model, ids: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """logits [s, v]; each layer's output [s, h], before the final norm; router logits [s, E]."""
    outputs: list[Tensor] = []
    routers: list[Tensor] = []

    def hook(module, args, output):
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model

    def router_hook(module, args, output):
        routers.append(output[0])

    layers = plain.model.layers
    handles = [layer.register_forward_hook(hook) for layer in layers]
    gates = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]
    handles += [gate.register_forward_hook(router_hook) for gate in gates]
    logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, outputs, routers


def load_balancing(logits: Tensor, per_token: int) -> Tensor:
    """Router logits [T, E] of one layer and microbatch -> E sum_i f_i P_i, 1 when balanced."""
    tokens, experts = logits.shape
    probabilities = torch.softmax(logits.float(), -1)
    total = torch.zeros(())
    chosen = torch.topk(probabilities, per_token).indices
    for i in range(experts):
        fraction = int((chosen == i).sum()) / (tokens * per_token)
        total = total + fraction * probabilities[:, i].sum() / tokens
    return experts * total


def aux_loss(model, routers: list[list[Tensor]], o: Options) -> Tensor:
    """Router logits by sample and layer -> load-balancing loss: mean over microbatches [layers].

    A microbatch is that many samples in a row, whichever data-parallel rank has it.
    """
    size, per_token = o.micro_batch_size, model.config.num_experts_per_tok
    groups = [routers[i : i + size] for i in range(0, len(routers), size)]
    values = [
        torch.stack([load_balancing(torch.cat(layer), per_token) for layer in zip(*g, strict=True)])
        for g in groups
    ]
    return torch.stack(values).mean(0)


def by_file_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In memory transformers fuses a layer's experts; files name each one's matrices."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for i, expert in enumerate(tensor):
            parts = kind.replace("gate_up_proj", "gate_proj up_proj").split()
            for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                result[f"{prefix}.{i}.{part}.weight"] = matrix
    return result


def window(n: int, size: int, rule: str) -> list[int]:
    """Generated positions that the flow loss looks at."""
    if n <= size:
        return list(range(n))
    if rule == "contiguous":
        return list(range(size))
    return [int(i * (n - 1) / (size - 1) + 0.5) for i in range(size)]


def divergence(student: Tensor, teacher: Tensor, o: Options) -> tuple[Tensor, float, float]:
    """Logits [v] of one token -> (divergence [], clipped fraction, teacher entropy)."""
    student, teacher = student / o.temperature, teacher / o.temperature
    if o.top_k:
        kept = torch.topk(teacher, o.top_k).indices
        student, teacher = student[kept], teacher[kept]
    p_s, p_t = torch.softmax(student, 0), torch.softmax(teacher, 0)
    if o.beta == 0:
        terms = p_t * (p_t.log() - p_s.log())
    elif o.beta == 1:
        terms = p_s * (p_s.log() - p_t.log())
    else:
        m = (1 - o.beta) * p_s + o.beta * p_t
        terms = o.beta * p_t * (p_t.log() - m.log()) + (1 - o.beta) * p_s * (p_s.log() - m.log())
    entropy = float(-(p_t * p_t.log()).sum())
    if o.clip_mode == "entry":
        clipped = float((terms > o.clip).double().mean())
        return terms.clamp(max=o.clip).sum(), clipped, entropy
    total = terms.sum()
    if o.clip_mode == "token":
        over = bool(total > o.clip)
        return total.clamp(max=o.clip), float(over), entropy
    return total, 0.0, entropy


def sampled_token(student: Tensor, teacher: Tensor, token: int, o: Options):
    """OPSD's policy-gradient form for one token."""
    log_s = torch.log_softmax(student / o.temperature, 0)[token]
    log_p = torch.log_softmax(teacher / o.temperature, 0)
    advantage = (log_p[token] - log_s).detach()
    return -advantage * log_s, 0.0, float(-(log_p.exp() * log_p).sum())


def cross_entropy(student: Tensor, teacher: Tensor, token: int, o: Options):
    """Supervised fine-tuning on one token; the teacher counts for its entropy alone."""
    log_p = torch.log_softmax(teacher / o.temperature, 0)
    loss = -torch.log_softmax(student / o.temperature, 0)[token]
    return loss, 0.0, float(-(log_p.exp() * log_p).sum())


def unit_transitions(hidden: Tensor) -> Tensor:
    """[m, h] -> [m-1, h]."""
    rows = []
    for i in range(hidden.shape[0] - 1):
        delta = hidden[i + 1].float() - hidden[i].float()
        rows.append(delta / delta.norm())
    return torch.stack(rows)


def relative_depth(student_layers: int, teacher_layers: int) -> list[int]:
    """Student layer l -> teacher layer round(l L_T / L_S), halves up, at least 1."""
    exact = [layer * teacher_layers / student_layers for layer in range(1, student_layers + 1)]
    return [max(1, int(x + 0.5)) for x in exact]


def flow_terms(
    student: list[Tensor], teacher: list[Tensor], layer_map: list[int] | None = None
) -> tuple[list, list, list]:
    """Hidden states at the window, [m, h] a layer -> direction, geometry, adjacent values.

    ``layer_map``: the teacher layer (1-based) of each student layer.  Without equal widths there
    are no directions to compare: an empty list.
    """
    teacher = [teacher[k - 1] for k in layer_map or relative_depth(len(student), len(teacher))]
    same_width = student[0].shape[1] == teacher[0].shape[1]
    if student[0].shape[0] < 2:
        zero, number = torch.zeros(()), len(student)
        return [zero] * (number if same_width else 0), [zero] * number, [zero] * (number - 1)
    s, t = [unit_transitions(h) for h in student], [unit_transitions(h) for h in teacher]
    n = s[0].shape[0]
    direction = [sum(1 - (a * b).sum() for a, b in zip(x, y, strict=True)) / n
                 for x, y in zip(s, t, strict=True) if same_width]  # fmt: skip
    geometry = [((x @ x.T - y @ y.T) ** 2).sum() / n**2 for x, y in zip(s, t, strict=True)]
    adjacent = [
        ((s[i] @ s[i + 1].T - t[i] @ t[i + 1].T) ** 2).sum() / n**2 for i in range(len(s) - 1)
    ]
    return direction, geometry, adjacent


def pointwise_terms(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """Cosine distance of the hidden states at the window, mean over it, in each layer."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        distances = [1 - torch.dot(a / a.norm(), b / b.norm()) for a, b in zip(s, t, strict=True)]
        values.append(sum(distances) / len(distances) if distances else torch.zeros(()))
    return values


def cka_terms(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """1 - linear CKA of the hidden states at the window, in each layer, by cross-covariances."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        if len(s) < 2:
            values.append(torch.zeros(()))
            continue
        x, y = (h.float() - h.float().mean(0) for h in (s, t))
        norm = (x.T @ x).norm() * (y.T @ y).norm()
        values.append(1 - (y.T @ x).norm() ** 2 / norm)
    return values


def named_terms(
    student: list[Tensor], teacher: list[Tensor], o: Options
) -> dict[str, list[Tensor] | None]:
    """Every term that ``o`` names, by layer or pair; None where it needs equal widths."""
    mapped = [teacher[k - 1] for k in o.layer_map or relative_depth(len(student), len(teacher))]
    direction, geometry, adjacent = flow_terms(student, teacher, o.layer_map)
    same_width = student[0].shape[1] == teacher[0].shape[1]
    known = {
        "direction": direction if same_width else None,
        "geometry": geometry,
        "adjacent": adjacent,
        "pointwise": pointwise_terms(student, mapped) if same_width else None,
        "cka": cka_terms(student, mapped),
    }
    return {name: known[name] for name in (t.split("=")[0] for t in o.terms.split(","))}


PAIRS = ("adjacent",)


def flow_objective(values: dict[str, list[Tensor] | None], o: Options) -> Tensor:
    """Means over the batch by layer and pair -> L_flow of the chosen terms and layers."""
    weights = dict(t.split("=") if "=" in t else (t, None) for t in o.terms.split(","))
    number = max(len(v) + (name in PAIRS) for name, v in values.items() if v is not None)
    layers = [i - 1 for i in o.layers or range(1, number + 1)]
    total, local, pairs = torch.zeros(()), [], []
    for name, v in values.items():
        if v is None:
            continue
        kept = [v[i] for i in layers if name not in PAIRS or i + 1 in layers]
        mean = sum(kept) / len(kept) if kept else torch.zeros(())
        if weights[name] is not None:
            total = total + float(weights[name]) * mean
        else:
            (pairs if name in PAIRS else local).append(mean)
    # Each layer's loss is the mean of its terms: without directions, of the one that is left.
    parts = [sum(means) / len(means) for means in (local, pairs) if means]
    return total + (sum(parts) / len(parts) if parts else 0.0)


def sequence_terms(student, teacher, sample: dict, o: Options):
    """(list of per-token (loss, clipped, entropy), flow terms, router logits) of a replay line."""
    response = sample["response_ids"]
    prompt, privileged = sample["student_prompt_ids"], sample["teacher_prompt_ids"]
    logits, hidden, routers = run(student, prompt + response)
    with torch.no_grad():
        teacher_logits, teacher_hidden, _ = run(teacher, privileged + response)
    # Vocabularies may be padded differently: what both have.
    common = min(logits.shape[1], teacher_logits.shape[1])
    logits, teacher_logits = logits[:, :common], teacher_logits[:, :common]
    # Tokens that the student did not write are read, and that is all.
    written = [i for i, m in enumerate(sample.get("response_mask") or [1] * len(response)) if m]
    tokens = []
    for i in written:
        token = response[i]
        pair = logits[len(prompt) - 1 + i], teacher_logits[len(privileged) - 1 + i]
        if o.objective == "jsd":
            tokens.append(divergence(*pair, o))
        elif o.objective == "cross_entropy":
            tokens.append(cross_entropy(*pair, token, o))
        else:
            tokens.append(sampled_token(*pair, token, o))
    w = [written[i] for i in window(len(written), o.window_size, o.window_rule)]
    at, teacher_at = [len(prompt) + i for i in w], [len(privileged) + i for i in w]
    sides = [h[at] for h in hidden], [h[teacher_at] for h in teacher_hidden]
    return tokens, named_terms(*sides, o), routers


def objective(student, teacher, samples: list[dict], o: Options) -> tuple[Tensor, dict]:
    """The total loss of a global batch, with graph, and its metrics."""
    tokens, flows, routers = [], [], []
    for sample in samples:
        more, flow, logits = sequence_terms(student, teacher, sample, o)
        tokens += more
        flows.append(flow)
        routers.append(logits)
    opsd = sum(t[0] for t in tokens) / len(tokens)
    means = {
        name: None if flows[0][name] is None else [
            sum(f[name][i] for f in flows) / len(flows) for i in range(len(flows[0][name]))
        ]
        for name in flows[0]
    }  # fmt: skip
    flow = flow_objective(means, o)
    loss = opsd + o.alpha * flow
    metrics = {
        "loss": loss.item(),
        "opsd": opsd.item(),
        "flow": flow.item(),
        "clipped_fraction": sum(t[1] for t in tokens) / len(tokens),
        "teacher_entropy": sum(t[2] for t in tokens) / len(tokens),
        "rollout_tokens": len(tokens),
    }
    for name, values in means.items():
        by = "pair" if name in PAIRS else "layer"
        metrics[f"flow_{name}"] = (sum(values) / len(values)).item() if values else None
        metrics[f"flow_{name}_per_{by}"] = None if values is None else [x.item() for x in values]
    if o.aux_coeff:
        balance = aux_loss(student, routers, o)
        metrics["moe_aux_loss"] = balance.mean().item()
        loss = loss + o.aux_coeff * balance.sum()
    return loss, metrics


def read_replay(path: str) -> list[dict]:
    """The lines of a replay file."""
    with open(path) as f:
        return [json.loads(line) for line in f if line.strip()]


def compute(
    directory: str,
    samples: list[dict],
    o: Options,
    dtype=torch.float32,
    teacher_directory: str | None = None,
    adapter=None,
) -> Result:
    """Value of every metric and gradient of every trained parameter.

    The teacher has the same weights without the adapter, or is the model in
    ``teacher_directory``.
    """
    student = load_model(directory, dtype, adapter)
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


def layer_numbers(text: str) -> tuple[int, ...]:
    """Of ``2,4,6``: (2, 4, 6)."""
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Print the metrics of one global batch as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-model", required=True)
    parser.add_argument("--replay-file", required=True)
    parser.add_argument("--teacher-hf-model")
    for f in dataclasses.fields(Options):
        flag = "--" + f.name.replace("_", "-")
        kind = type(f.default) if f.default is not None else layer_numbers
        parser.add_argument(flag, type=kind, default=f.default)
    given = vars(parser.parse_args())
    directory, replay = given.pop("hf_model"), given.pop("replay_file")
    teacher, o = given.pop("teacher_hf_model"), Options(**given)
    result = compute(directory, read_replay(replay), o, teacher_directory=teacher)
    print(json.dumps(result.metrics))


if __name__ == "__main__":
    main()
