"""OPSD + PHF in a plain PyTorch loop on a transformers model, by megatron_phf.losses alone."""

import torch
from torch.nn.utils.rnn import pad_sequence as pad

from megatron_phf.losses import DivergenceSpec, flow_loss, generalized_jsd, window_batch


def padded(lists, device, side="right"):
    """Token ids and their attention mask, each [b, longest]."""
    rows = [torch.tensor(row) for row in lists]
    both = rows, [torch.ones_like(row) for row in rows]
    return [pad(x, batch_first=True, padding_side=side).to(device) for x in both]


def run(model, prompts, responses):
    """Token ids -> logits of all response tokens [n, v], each layer's window states [b, m, h]."""
    inner = getattr(model, "module", model)  # of a DistributedDataParallel, which must be called
    ids, mask = padded([[*p, *r] for p, r in zip(prompts, responses, strict=True)], inner.device)
    states, hooks = [], []  # not output_hidden_states: its last entry is behind the final norm
    for layer in inner.get_decoder().layers:
        hooks.append(layer.register_forward_hook(lambda layer, _, output: states.append(output)))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    # The logits that predict a token stand one position before it, the first one's in the prompt.
    spans = zip(logits, prompts, responses, strict=True)
    scored = torch.cat([row[len(p) - 1 : len(p) - 1 + len(r)] for row, p, r in spans])
    at = torch.tensor([[len(p)] for p in prompts]) + window_batch([len(r) for r in responses])[0]
    return scored, [layer[torch.arange(len(at))[:, None], at] for layer in states]


def phf_loss(student, teacher, student_prompts, teacher_prompts, responses, alpha=0.05):
    """L_OPSD + alpha L_flow: the teacher reads the same responses behind the privileged prompts."""
    with torch.no_grad():
        teacher_logits, teacher_states = run(teacher, teacher_prompts, responses)
    logits, states = run(student, student_prompts, responses)
    valid = window_batch([len(r) for r in responses])[1].to(logits.device)
    jsd = generalized_jsd(logits, teacher_logits, DivergenceSpec()).per_token.mean()
    return jsd + alpha * flow_loss(states, teacher_states, valid).loss


def sample(model, prompts, eos, **settings):
    """The student's own answers, up to and with the stop token."""
    ids, mask = padded(prompts, model.device, side="left")
    settings = {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "pad_token_id": eos} | settings
    out = model.generate(ids, attention_mask=mask, do_sample=True, eos_token_id=eos, **settings)
    return [r[: r.index(eos) + 1] if eos in r else r for r in out[:, ids.shape[1] :].tolist()]


def train(student, teacher, batches, eos, optimizer, **settings):
    """``batches`` of (student prompts, teacher prompts), each a list of token ids; the losses."""
    for prompts in batches:
        responses = sample(student, prompts[0], eos, **settings)
        loss = phf_loss(student, teacher, *prompts, responses)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
