"""The cache that decoding reads and writes, and what happens where no graph can be captured."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_phf.config.flags import parse_args
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.model.architecture import parse_architecture
from megatron_phf.model.attention import attend_token
from megatron_phf.rollout.megatron.cache import KVCache
from megatron_phf.rollout.megatron.capacity import capacity_before, capacity_for
from megatron_phf.rollout.megatron.decode import decode_layer
from megatron_phf.rollout.megatron.flags import check_decoding
from megatron_phf.rollout.megatron.graphs import StepGraphs
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, parallel

TOP_K = SamplingParams(1.1, 0.95, 20, 8, (), seed=0)
NUCLEUS = SamplingParams(1.1, 0.95, 0, 8, (), seed=0)


def test_capacities_are_few_and_hardly_larger_than_asked() -> None:
    found = {n: capacity_for(n) for n in range(1, 16385)}
    assert all(n <= c and c % 64 == 0 and c - n < max(64, n / 4) for n, c in found.items())
    assert (found[1], found[65], found[129], found[1025]) == (64, 128, 192, 1280)
    assert len({*found.values()}) <= 28
    sizes = sorted({*found.values()})
    assert [capacity_before(n) for n in sizes] == [0, *sizes[:-1]]


@pytest.mark.parametrize(
    ("fixed", "columns"), [(True, [64, 128]), (False, [16, 32, 48, 64, 80, 96, 112, 128])]
)
def test_attention_over_what_is_not_written_is_that_over_the_tokens(
    fixed: bool, columns: list[int]
) -> None:
    """Rows of different lengths, expanded, growing; what is hidden counts for nothing.

    Fixed shapes change with the capacity alone; others attend no further than to a block's end.
    """
    torch.manual_seed(0)
    groups, width, prompt, tokens = 2, 8, 5, 120
    seen = torch.tensor([[False, False, True, True, True], [True] * 5])
    cache = KVCache(seen, prompt + tokens, fixed)
    inv_freq = torch.ones(width // 2)
    positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
    cache.begin(inv_freq, positions, torch.float32)
    assert cache.mask is not None and cache.mask[0, 0, 3].tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]
    both = torch.randn(prompt, 2, groups, 2, width)
    cache.fill(0, both)
    cache.finish()
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    seen, both = seen[rows], both[:, rows]
    met = [columns[0]]
    for count in range(1, tokens):
        changed = cache.reserve(prompt + count)
        cache.begin(inv_freq, torch.full((3, 1), count), torch.float32)
        new = torch.randn(1, 3, groups, 2, width)
        both = torch.cat((both, new))
        query = torch.randn(3, groups, 4, width)
        keys, values = cache.append(0, new)
        found = attend_token(query, keys, values, cache.bias, 0.3)
        cache.finish()
        met += [keys.shape[2]] * changed
        assert keys.shape[2] == met[-1]
        mask = F.pad(seen, (0, count), value=True)[:, None, None]
        k, v = both.permute(3, 1, 2, 0, 4)
        exact = F.scaled_dot_product_attention(query, k, v, mask, scale=0.3)
        torch.testing.assert_close(found, exact)
    assert met == columns and cache.capacity == 128


class Launches(TorchDispatchMode):
    """Counts operators that compute something: on CUDA about a kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, given=(), named=None):
        returned = [r.alias_info for r in operator._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returned)
        self.met[operator.__name__] += (
            not views and operator is not torch.ops.aten._unsafe_view.default
        )
        return operator(*given, **(named or {}))


class ColumnParallelLinear(torch.nn.Linear):
    """The name says what decoding may take for a product."""


@pytest.mark.parametrize(("norms", "launches"), [(True, 18), (False, 15)])
def test_a_layers_token_takes_few_launches(
    norms: bool, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 products, 4 (2) norms, keys and queries turned and stored together, attention, the MLP."""
    monkeypatch.setattr(F, "rms_norm", lambda x, *given: x.clone())  # one kernel on CUDA
    monkeypatch.setattr(parallel, "tensor_parallel_size", lambda: 1)
    groups, heads, width, hidden = 2, 2, 8, 16
    norm = SimpleNamespace(weight=torch.ones(1), eps=1e-6)

    def linear(rows: int, columns: int) -> torch.nn.Linear:
        return ColumnParallelLinear(columns, rows, bias=False)

    attention = SimpleNamespace(
        linear_qkv=linear(groups * (heads + 2) * width, hidden),
        linear_proj=linear(hidden, groups * heads * width),
        q_layernorm=norm if norms else IdentityOp(),
        k_layernorm=norm if norms else IdentityOp(),
        num_query_groups_per_partition=groups,
        hidden_size_per_attention_head=width,
        config=SimpleNamespace(softmax_scale=None, kv_channels=width),
    )
    mlp: Any = MLP.__new__(MLP)
    mlp.__dict__ |= {"linear_fc1": linear(64, hidden), "linear_fc2": linear(hidden, 32)}
    layer: Any = SimpleNamespace(
        input_layernorm=norm, self_attention=attention, layer_number=1, pre_mlp_layernorm=norm,
        mlp=mlp,
    )  # fmt: skip
    cache = KVCache(torch.ones(3, 4, dtype=torch.bool), 8)
    with torch.no_grad():
        for positions in (torch.arange(4).expand(3, 4), torch.full((3, 1), 4)):
            cache.begin(torch.ones(width // 2), positions, torch.float32)
            x = torch.randn(positions.shape[1], 3, hidden)
            with Launches() as counted:
                decode_layer(layer, x, cache)
            cache.finish()
    assert counted.met.total() == launches, counted.met


def test_a_step_that_cannot_be_captured_is_launched_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried, ran = [], []

    def captured(step: object) -> None:
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(device, "captured", captured)
    monkeypatch.setattr(parallel, "is_first_rank", lambda: True)
    graphs = StepGraphs(wanted=True)
    with pytest.warns(UserWarning, match=r"auto: a step cannot be captured \(operation not") as met:
        for _ in range(4):
            graphs.launch(lambda: ran.append(1), TOP_K)
    assert (len(met), len(tried), len(ran)) == (1, 1, 4)
    graphs = StepGraphs(wanted=True, required=True)
    graphs.launch(lambda: None, TOP_K)
    with pytest.raises(ValueError, match="--decode-cuda-graphs on: a step cannot be captured"):
        graphs.launch(lambda: None, TOP_K)


def test_steps_are_captured_the_second_time_and_anew_after_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    def captured(step: object) -> object:
        log.append("capture")
        return lambda: log.append("replay")

    monkeypatch.setattr(device, "captured", captured)
    graphs = StepGraphs(wanted=True)

    def steps(count: int, sampling: SamplingParams) -> list[str]:
        graphs.forget()
        log.clear()
        for _ in range(count):
            graphs.launch(lambda: log.append("run"), sampling)
        return list(log)

    assert steps(4, TOP_K) == ["run", "capture", "replay", "replay", "replay"]
    assert steps(2, TOP_K) == ["run", "capture", "replay"]
    # How often the nucleus is searched for depends on the numbers.
    assert steps(3, NUCLEUS) == ["run"] * 3


def test_the_host_reads_one_step_late_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, reader = torch.zeros(1), device.LateReader()
    assert reader.read(tensor) is tensor
    waited: list[int] = []
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "host_buffer", torch.empty_like)
    monkeypatch.setattr(device, "when_done", lambda: lambda: waited.append(1))
    found = [reader.read(tensor.fill_(i)) for i in range(4)]
    assert [None if f is None else f.item() for f in found] == [None, 0, 1, 2]
    assert len(waited) == 3


@pytest.mark.parametrize(
    ("flags", "gpus", "message"),
    [
        ([], 0, "on: there is no GPU here; use auto or off"),
        (["--pipeline-model-parallel-size", "2"], 2, "on: with --pipeline-model-parallel-size ab"),
    ],
)
def test_graphs_that_cannot_be_are_refused(flags: list[str], gpus: int, message: str) -> None:
    arch = parse_architecture(MODEL_CONFIG, "the embedded model")
    check_decoding(parse_args(flags), arch, gpus)
    check_decoding(parse_args(["--decode-cuda-graphs", "on"]), arch, 1)
    with pytest.raises(ValueError, match=message):
        check_decoding(parse_args([*flags, "--decode-cuda-graphs", "on"]), arch, gpus)
