"""What a GPU's kernels are chosen and fed by, as far as a CPU shows it."""

from __future__ import annotations

import importlib
import sys
import threading
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.nn.attention import SDPBackend

from megatron_phf.hidden.rows import SequenceShards
from megatron_phf.losses import chunked
from megatron_phf.model import attention, fp8
from megatron_phf.runtime import device
from megatron_phf.train import adam_state
from megatron_phf.weights import torch_dist
from tests.launch import REPO


def kernel(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """What torch takes on CUDA without cuDNN, by the conditions of its sdp_utils.cpp (2.13)."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    grouped = query.shape[1] != key.shape[1]
    assert grouped == enable_gqa, "torch refuses other numbers of heads"
    square = query.shape[2] == key.shape[2]
    if attn_mask is None and half and (square or not is_causal):
        return SDPBackend.FLASH_ATTENTION
    return SDPBackend.MATH if grouped else SDPBackend.EFFICIENT_ATTENTION


@pytest.mark.parametrize(
    ("dtype", "queries", "masked", "expected"),
    [
        (torch.bfloat16, 8, False, SDPBackend.FLASH_ATTENTION),  # training, prefill
        (torch.bfloat16, 8, True, SDPBackend.EFFICIENT_ATTENTION),  # prefill behind padding
        (torch.bfloat16, 4, True, SDPBackend.EFFICIENT_ATTENTION),  # a context rank's queries
        (torch.float32, 8, False, SDPBackend.EFFICIENT_ATTENTION),
        (torch.float32, 8, True, SDPBackend.EFFICIENT_ATTENTION),
    ],
)
@pytest.mark.parametrize("groups", [2, 6])
def test_attention_is_fused(
    dtype: torch.dtype, queries: int, masked: bool, expected: SDPBackend, groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And as on a CPU, with its gradient."""
    torch.manual_seed(0)
    shapes = [(2, 6, queries, 16), (2, groups, 8, 16), (2, groups, 8, 16)]
    q, k, v = inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    mask = torch.ones(queries, 8).tril(8 - queries).bool()[None, None] if masked else None
    on_cpu = attention.attend(q, k, v, mask, mask is None, 0.25)
    wanted = torch.autograd.grad(on_cpu.float().square().sum(), inputs)
    taken = []

    def record(*args, **kwargs):
        taken.append(kernel(*args, **kwargs))
        return original(*args, **kwargs)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    out = attention.attend(q, k, v, mask, mask is None, 0.25)
    found = torch.autograd.grad(out.float().square().sum(), inputs)
    assert taken == [expected]
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for ours, reference in zip((out, *found), (on_cpu, *wanted), strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_decoding_has_no_groups_left(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads of a group are the queries of one, of eight keys."""
    q, k = torch.randn(2, 3, 4, 16).bfloat16(), torch.randn(2, 3, 8, 16).bfloat16()
    bias = torch.zeros(2, 1, 1, 8).bfloat16() if masked else None
    taken = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kw: taken.append(kernel(*args, **kw))
    )
    attention.attend_token(q, k, k, bias, 0.25)
    fused = SDPBackend.EFFICIENT_ATTENTION if masked else SDPBackend.FLASH_ATTENTION
    assert taken == [fused]


def test_cudnn_attention_is_off_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.cuda_on_cpu, "install", lambda: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before
    try:
        device.setup()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        monkeypatch.setattr(device, "has_cuda", lambda: True)
        device.setup()
        kinds = ("flash", "mem_efficient", "math", "cudnn")
        on = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds]
        assert on == [True, True, True, False]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class _Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("context", "sequence", "alignment", "cpu", "cuda"),
    [(1, 1, 1, 1, 64), (1, 2, 16, 32, 64), (2, 1, 1, 4, 128), (1, 3, 1, 3, 192),
     (2, 4, 32, 256, 256)],
)  # fmt: skip
def test_row_multiple(
    context: int, sequence: int, alignment: int, cpu: int, cuda: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    groups = (None if n == 1 else _Group(n) for n in (context, sequence))
    shards = SequenceShards(*groups, alignment)  # type: ignore[arg-type]
    assert shards.multiple_with(device.row_multiple()) == shards.length_multiple == cpu
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    assert shards.multiple_with(device.row_multiple()) == cuda
    assert cuda % cpu == 0 and cuda // context % 64 == 0


@pytest.mark.parametrize(
    ("rows", "entries", "cpu", "cuda"),
    [(256, 151_936, 6, 128), (256, 37_984, 27, 256), (40, 151_936, 6, 40), (256, 10**9, 1, 1)],
)
def test_blocks_of_the_divergence(rows: int, entries: int, cpu: int, cuda: int) -> None:
    """A block's fp32 entries: at most 4 MiB, and 128 MiB on CUDA, in equal parts of a chunk."""
    for kind, size, limit in (("cpu", cpu, 2**22), ("cuda", cuda, 2**27)):
        assert chunked._block_rows(rows, entries, kind) == size
        assert size == 1 or 4 * size * entries <= limit


def test_a_chunk_is_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(10, 8), torch.randn(10, 8), torch.randn(33, 8), torch.randn(33, 8)]
    found = []
    for size in (2**22, 4 * 33 * 3):
        monkeypatch.setitem(chunked._BLOCK_BYTES, "cpu", size)
        rows = inputs[0].clone().requires_grad_()
        result = chunked.chunked_divergence(
            rows, *inputs[1:], torch.rand(10, generator=torch.Generator().manual_seed(0)),
            chunked.DivergenceSpec(), chunk_tokens=7,
        )  # fmt: skip
        result.loss.backward()
        found.append((result.loss, result.per_token, rows.grad))
    torch.testing.assert_close(*found)


def test_a_thread_has_its_process_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a new thread GPU 0, on which every rank would then open a context."""
    current = threading.local()
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: setattr(current, "index", i))
    torch.cuda.set_device(3)
    seen: list[int] = []

    def look() -> None:
        seen.append(torch.cuda.current_device())

    for target in (device.in_thread(look), look):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert seen == [3, 0]


def test_an_asynchronous_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are queued, pinned memory is taken once, and the writer waits for the copies."""
    order: list[str] = []
    event = SimpleNamespace(
        record=lambda: order.append("record"), synchronize=lambda: order.append("wait")
    )
    empty, copy = torch.empty, torch.Tensor.copy_

    def pinned(*args, pin_memory=False, **kwargs):
        order.append(f"pinned={pin_memory}")
        return empty(*args, **kwargs)

    def queued(self, source, non_blocking=False):
        order.append(f"non_blocking={non_blocking}")
        return copy(self, source)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", queued)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    weight, buffers = torch.zeros(3), torch_dist.HostBuffers()
    for value in (1.0, 2.0):
        weight.fill_(value)
        state = {"a": [ShardedTensor.from_rank_offsets("w", weight)]}
        torch_dist._copy_tensors(state, buffers)
        done = device.when_done()
        weight.fill_(9.0)
        done()
        assert state["a"][0].data.tolist() == [value] * 3
    copied = ["non_blocking=True", "record", "wait"]
    assert order == ["pinned=True", *copied, *copied]


@pytest.fixture
def fused_adam():
    """The stand-in's."""
    path = str(REPO / "tests" / "fake_te")
    sys.path.insert(0, path)
    try:
        yield importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
    finally:
        sys.path.remove(path)
        for name in [n for n in sys.modules if n.startswith("transformer_engine")]:
            del sys.modules[name]


def saved(adam: torch.optim.Optimizer, *, distributed: bool) -> dict:
    """What megatron-core's optimizers save of ``adam``: moments apart where ``distributed``."""
    adam_state.allocate(adam)
    state = adam.state_dict()
    moments = {n: {k: v.clone() for k, v in s.items()} for n, s in state["state"].items()}
    steps = [s.pop("step").item() for s in moments.values() if "step" in s]
    if distributed:
        groups = [{**g, **({"step": steps[0]} if steps else {})} for g in state["param_groups"]]
        return {"optimizer": {"param_groups": groups}, "param_state": moments}
    if steps and steps[0]:
        moments["common_step"] = torch.tensor(steps[0])
    return {"state": moments, "param_groups": state["param_groups"]}


def asked(adam: torch.optim.Optimizer, *, distributed: bool) -> dict:
    """What they ask a checkpoint for: places of moments, and plain values of their own."""
    state = saved(adam, distributed=distributed)
    moments = state["param_state"] if distributed else state["state"]
    for number, each in moments.items():
        if isinstance(each, dict):
            moments[number] = {name: Ellipsis for name in each}
    return state


def resume(adam: torch.optim.Optimizer, state: dict) -> None:
    """As megatron-core's optimizers do."""
    places = asked(adam, distributed="param_state" in state)
    state = adam_state.restored(adam, places, state, adam_state.steps_taken(state))
    inner = state.get("optimizer", state)
    moments = state.get("param_state", inner.get("state"))
    if "param_state" in state and isinstance(adam, torch.optim.Adam):
        moments["common_step"] = torch.tensor(inner["param_groups"][0]["step"])
    if "common_step" in moments:
        step = moments.pop("common_step")
        for each in moments.values():
            each["step"] = step.clone()
    adam.load_state_dict({"state": moments, "param_groups": inner["param_groups"]})


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("order", ["tft", "ftf", "ttt", "fff"])
def test_adam_goes_on_as_another(distributed: bool, at: int, order: str, fused_adam) -> None:
    """torch's (t) or a fused one (f): saved after ``at`` steps and after five; eight in all."""
    kinds = {"t": torch.optim.AdamW, "f": fused_adam}
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator)
    gradients = torch.randn(8, 4, 3, generator=generator)
    straight, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    adam = torch.optim.AdamW([straight], **settings)
    for gradient in gradients:
        straight.grad = gradient.clone()
        adam.step()
    state = None
    for kind, steps in zip(order, (range(at), range(at, 5), range(5, 8)), strict=True):
        other = kinds[kind]([ours], **settings)
        if state is not None:
            resume(other, state)
        for step in steps:
            ours.grad = gradients[step].clone()
            other.step()
        state = saved(other, distributed=distributed)
    torch.testing.assert_close(ours, straight, rtol=1e-6, atol=1e-6)
    found = {**other.param_groups[0], **other.state[ours]}["step"]
    assert float(found) == 8


class _Rounded(torch.nn.Module):
    """A weight that is kept in whole numbers, and what it was made from, as FP8 parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))
        self.plain = torch.nn.Parameter(torch.zeros(2))
        self.weight.kept = torch.full((2, 2), 0.3)
        self.weight.get_high_precision_init_val = MethodType(lambda p: p.kept, self.weight)
        copy = torch.Tensor.copy_
        self.weight.copy_ = lambda source: copy(self.weight.data, source.round())


def test_weights_are_read_into_what_the_optimizer_starts_from() -> None:
    """--fp8-param-gather: masters are made of ``get_high_precision_init_val``."""
    module = _Rounded()
    original = module.weight
    with fp8.unrounded([module]):
        torch.testing.assert_close(module.weight.data, torch.full((2, 2), 0.3))
        module.load_state_dict({"weight": torch.full((2, 2), 1.7), "plain": torch.full((2,), 0.6)})
    assert module.weight is original
    assert original.tolist() == [[2.0] * 2] * 2
    torch.testing.assert_close(fp8.before_rounding(original), torch.full((2, 2), 1.7))
    whole = fp8.state_before_rounding(module)
    torch.testing.assert_close(whole["weight"], torch.full((2, 2), 1.7))
    assert whole["plain"] is not None and fp8.before_rounding(module.plain) is None
