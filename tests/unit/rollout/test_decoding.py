"""The cache that decoding reads and writes, and what happens where no graph can be captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_phf.config.flags import parse_args
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.model.architecture import parse_architecture
from megatron_phf.model.attention import attend_token
from megatron_phf.rollout.megatron.cache import KVCache
from megatron_phf.rollout.megatron.capacity import capacity_before, capacity_for
from megatron_phf.rollout.megatron.flags import check_decoding
from megatron_phf.rollout.megatron.graphs import StepGraphs
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, parallel

TOP_K = SamplingParams(1.1, 0.95, 20, 8, (), seed=0)
NUCLEUS = SamplingParams(1.1, 0.95, 0, 8, (), seed=0)


def test_capacities_are_few_and_hardly_larger_than_asked() -> None:
    found = {n: capacity_for(n) for n in range(1, 16385)}
    assert all(n <= c and c % 32 == 0 and c - n < max(32, n / 4) for n, c in found.items())
    assert (found[1], found[33], found[129], found[1025]) == (32, 64, 160, 1280)
    assert len({*found.values()}) <= 32
    sizes = sorted({*found.values()})
    assert [capacity_before(n) for n in sizes] == [0, *sizes[:-1]]


def test_attention_over_the_capacity_is_that_over_the_tokens() -> None:
    """Rows of different lengths, expanded, growing twice; what is hidden counts for nothing."""
    torch.manual_seed(0)
    groups, width, prompt, tokens = 2, 8, 5, 70
    seen = torch.tensor([[False, False, True, True, True], [True] * 5])
    cache = KVCache(seen, prompt + tokens)
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
    keys, values = torch.randn(2, prompt, 2, groups, width)
    cache.fill(0, keys, values)
    cache.finish()
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    seen, keys, values = seen[rows], keys[:, rows], values[:, rows]
    grew = 0
    for count in range(1, tokens):
        grew += cache.reserve(prompt + count)
        cache.begin(inv_freq, torch.full((3, 1), count), torch.float32)
        key, value = torch.randn(2, 1, 3, groups, width)
        keys, values = torch.cat((keys, key)), torch.cat((values, value))
        query = torch.randn(3, groups, 4, width)
        found = attend_token(query, *cache.append(0, key, value), cache.bias, 0.3)
        cache.finish()
        mask = F.pad(seen, (0, count), value=True)[:, None, None]
        k, v = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        exact = F.scaled_dot_product_attention(query, k, v, mask, scale=0.3)
        torch.testing.assert_close(found, exact)
    assert grew == 2 and cache.capacity == 96


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
