"""The client against a real HTTP server with vLLM's endpoints, which misbehaves on request."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_phf.config.flags import check_fields, parse_args
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.losses import chunked_log_probs
from megatron_phf.model.architecture import parse_architecture
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm.flags import check_vllm, server_urls
from megatron_phf.rollout.vllm.http import Patience
from megatron_phf.rollout.vllm.server import Question, VllmServer
from megatron_phf.rollout.vllm.sync import _check_server, _check_servers
from megatron_phf.runtime import device
from tests.doorway import Doorway
from tests.fake_vllm import FAULTS, FakeVllm

SAMPLING = SamplingParams(0.7, 0.9, 20, 8, (1, 2), seed=3)
QUESTION = Question([3, 4, 5], SAMPLING, seed=11, max_tokens=4)
PATIENCE = Patience(timeout=60.0, retries=3, backoff=0.02)
GOOD = Response([5, 6, 1], [-0.5, -0.5, -0.5])


def ask(
    fake: FakeVllm | Doorway, patience: Patience = PATIENCE, seconds: float = 60, **more
) -> Response:
    server = VllmServer(fake.url, patience, more.get("api_key"))
    return server.complete(
        QUESTION,
        more.get("model", "scripted"),
        32,
        time.monotonic() + seconds,
        threading.Event(),
        more.get("on_missing", lambda: None),
        more.get("policy", lambda: None),
    )


def test_the_request_says_all_that_sampling_depends_on() -> None:
    with FakeVllm(None) as fake:
        assert ask(fake) == GOOD
    (body,) = fake.bodies("/v1/completions")
    wanted = {
        "model": "scripted", "prompt": [3, 4, 5], "max_tokens": 4, "temperature": 0.7,
        "top_p": 0.9, "top_k": 20, "seed": 11, "stop_token_ids": [1, 2], "ignore_eos": True,
        "repetition_penalty": 1.0, "return_token_ids": True, "logprobs": 0,
    }  # fmt: skip
    assert wanted.items() <= body.items()


@pytest.mark.parametrize(
    ("told", "versions"), [([3, 3], (3, None)), ([3, 4], (3, 4)), ([3, 4, 5], (4, 5))]
)
def test_a_response_has_the_policies_before_and_behind_it(told: list[int], versions) -> None:
    """Those around the attempt that succeeded."""
    later = iter(told)
    with FakeVllm(None, ["500"] * (len(told) - 2)) as fake:
        response = ask(fake, policy=lambda: next(later))
        assert (response.policy_version, response.policy_version_end) == versions


TRANSIENT = ("500", "503", "slow", "drip", "truncated", "closed", "not_json", "no_choice", "abort")
FINAL = {
    "400": "status 400: 'scripted trouble'",
    "redirect": "status 302",
    "wrong_ids": "token_ids are not numbers: \\['5'\\]",
    "large_ids": "ids from 1 to 1000000, but the vocabulary ends at 32; does it serve the model",
    "too_long": "5 tokens, asked for 1 to 4",
    "early": "it ended before 4 tokens without a stop token",
    "after_stop": "tokens follow a stop token",
    "other_prompt": "answered another prompt",
    "no_token_ids": "vLLM 0.10.2 or newer",
    "no_log_probs": "no log-probability for each token",
    "nan_log_probs": "no log-probability for each token",
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_trouble_that_passes_is_survived(fault: str) -> None:
    patience = Patience(1.0, 3, 0.02) if fault in ("slow", "drip") else PATIENCE
    with FakeVllm(None, [fault, fault]) as fake:
        assert ask(fake, patience) == GOOD
        assert len(fake.bodies("/v1/completions")) == 3


@pytest.mark.parametrize("fault", FINAL)
def test_what_no_retry_can_cure_ends_at_once(fault: str) -> None:
    with FakeVllm(None, [fault]) as fake:
        with pytest.raises(ValueError, match=FINAL[fault]) as caught:
            ask(fake)
        assert str(caught.value).startswith(f"--vllm-url {fake.url}: ")
        assert len(fake.bodies("/v1/completions")) == 1


def test_all_faults_are_tested() -> None:
    others = {"ok", "restart", "shifted_log_probs"}  # tests/end_to_end/test_vllm_job.py
    assert set(TRANSIENT) | set(FINAL) | others == set(FAULTS)


def test_trouble_that_stays_ends_after_the_retries_with_growing_waits() -> None:
    with FakeVllm(None, ["503"] * 9) as fake:
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"failed 4 time.*status 503.*--vllm-max-retries"):
            ask(fake, Patience(60.0, 3, 0.1))
        assert len(fake.bodies("/v1/completions")) == 4
        assert time.monotonic() - start >= 0.5 * (0.1 + 0.2 + 0.4)


def test_a_server_can_be_killed_before_the_second_question() -> None:
    """What tests/real_vllm does to vLLM itself: no later, however fast the answers are."""
    with FakeVllm(None, down_seconds=0.0) as fake:
        answered: list[int] = []

        def kill() -> None:
            answered.append(len(fake.bodies("/v1/completions")))
            fake.restart()

        with Doorway(fake.url, "/v1/completions", 2, kill) as door:
            for _ in range(4):
                assert ask(door, Patience(60.0, 9, 0.02)) == GOOD
            assert door.acted.is_set() and door.count == 5
        assert answered == [1] and len(fake.bodies("/v1/completions")) == 4


def test_nothing_is_retried_beyond_the_deadline() -> None:
    over = r"failed 1 time.*time of a rollout phase is over"
    with FakeVllm(None, ["503"] * 9) as fake, pytest.raises(ValueError, match=over):
        ask(fake, Patience(0.5, 8, 30.0), seconds=1)


def test_a_server_that_is_not_there() -> None:
    with FakeVllm(None) as fake:
        pass
    with pytest.raises(ValueError, match=r"failed 4 time.*ConnectionRefused.*is the server up"):
        ask(fake)


def test_a_restart_in_between() -> None:
    """Connections are refused for a while; then the adapter is unknown and is loaded again."""
    with FakeVllm(None, ["restart"]) as fake:
        fake.adapters["a"] = "somewhere"
        called = []

        def on_missing() -> None:
            called.append(1)
            fake.adapters["a"] = "somewhere"

        assert ask(fake, Patience(60.0, 8, 0.05), model="a", on_missing=on_missing) == GOOD
        assert called == [1]


def test_the_api_key() -> None:
    with FakeVllm(None, api_key="secret") as fake:
        assert ask(fake, api_key="secret") == GOOD
        with pytest.raises(ValueError, match=r"status 401: 'Unauthorized'; .*-api-key-file"):
            ask(fake)


def test_adapters(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    until = time.monotonic() + 60
    with FakeVllm(None) as fake:
        server = VllmServer(fake.url, PATIENCE)
        server.load_adapter("a", str(tmp_path), until)
        server.load_adapter("a", str(tmp_path), until)  # an answer that was lost: loaded is loaded
        assert [card["id"] for card in server.models(until)] == ["scripted", "a"]
        assert ask(fake, model="a") == GOOD
        server.unload_adapter("a", until)
        server.unload_adapter("a", until)
        assert fake.adapters == {}
        with pytest.raises(ValueError, match=r"found.*VLLM_ALLOW_RUNTIME_LORA_UPDATING") as caught:
            server.load_adapter("b", str(tmp_path / "nowhere"), until)
        assert str(caught.value).count("status ") == 1


def test_reload_needs_dev_mode() -> None:
    with FakeVllm(None, dev_mode=False) as fake:
        server = VllmServer(fake.url, PATIENCE)
        with pytest.raises(ValueError, match=r"collective_rpc is missing.*VLLM_SERVER_DEV_MODE=1"):
            server.reload_weights(time.monotonic() + 60)


def test_a_prefix_cache_that_requests_hold_is_reset_after_them() -> None:
    """vLLM says so with status 200."""
    with FakeVllm(None, ["slow"]) as fake, ThreadPoolExecutor(1) as pool:
        fake.slow_until = lambda: len(fake.bodies("/reset_prefix_cache")) > 2
        running = pool.submit(ask, fake, Patience(60.0, 0, 1.0))
        while not fake.most_at_once:
            time.sleep(0.01)
        server = VllmServer(fake.url, Patience(60.0, 0, 0.02))
        with pytest.raises(ValueError, match=r"reset_prefix_cache failed 1 time.*that still run"):
            server.reload_weights(time.monotonic() + 60)
        assert not running.done()
        VllmServer(fake.url, Patience(60.0, 9, 0.05)).reload_weights(time.monotonic() + 60)
        assert running.result(60) == GOOD
        assert len(fake.bodies("/collective_rpc")) == 2
        assert len(fake.bodies("/reset_prefix_cache")) > 2


def test_a_server_that_this_run_cannot_use(tmp_path) -> None:
    """Refused before the weights are read: it reads others, or its sequences are too short."""
    arch = parse_architecture(MODEL_CONFIG, "test")
    served = str(tmp_path / "served")
    flags = ["--rollout-engine", "vllm", "--vllm-sync-dir", served, "--max-prompt-length", "20"]
    config = parse_args([*flags, "--max-new-tokens", "50", "--hf-model", "x"])
    with FakeVllm(None, max_model_len=70) as fake:
        server = VllmServer(fake.url, PATIENCE)
        with pytest.raises(ValueError, match=f"serves scripted, but.*vllm serve {served}"):
            _check_server(server, config, arch)
        _check_server(server, config.replaced(lora_rank=4), arch)
        fake.max_model_len = 69
        with pytest.raises(ValueError, match=r"end at 69 tokens.*--max-model-len 70"):
            _check_server(server, config.replaced(lora_rank=4), arch)


@pytest.mark.parametrize("way", ["torch_distributed", "nccl", "ipc"])
def test_both_sides_have_one_nccl(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server says which it has, and where NCCL carries the weights."""
    arch = parse_architecture({**MODEL_CONFIG, "max_position_embeddings": 256}, "test")
    config = parse_args(["--rollout-engine", "vllm", "--vllm-weight-sync", way])
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7, "suffix"))
    with FakeVllm(None) as fake:
        server = VllmServer(fake.url, PATIENCE)
        for packages in ("torch==2.13.0", "nvidia-nccl-cu13==2.29.7\ntorch==2.13.0"):
            fake.packages = packages
            _check_servers([server], config, arch)
        fake.packages = "[pip3] nvidia-nccl-cu13==2.30.7"
        if way == "ipc":
            _check_servers([server], config, arch)
            return
        with pytest.raises(ValueError, match=r"has NCCL 2\.30\.7, the trainer NCCL 2\.29\.7"):
            _check_servers([server], config, arch)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_log_probabilities_of_tokens(chunk: int) -> None:
    """Against torch's log_softmax; two rows of the output head are padding."""
    torch.manual_seed(0)
    rows, weight, ids = torch.randn(7, 5), torch.randn(11, 5), torch.randint(9, (7,))
    expected = (rows @ weight[:9].T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    found = chunked_log_probs(rows, weight, ids, vocab_size=9, chunk_tokens=chunk)
    torch.testing.assert_close(found, expected)
    assert chunked_log_probs(rows[:0], weight, ids[:0]).shape == (0,)


VLLM = ["--rollout-engine", "vllm", "--hf-model", "x", "--data", "y", "--vllm-url"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vllm-url", "http://h:1"], "--vllm-url and --rollout-engine vllm belong together"),
        (["--rollout-engine", "vllm"], "--vllm-url and --rollout-engine vllm belong together"),
        ([*VLLM, "localhost:8000"], "--vllm-url 'localhost:8000': need http://HOST:PORT"),
        ([*VLLM, "http://h:1,ftp://h:1"], "--vllm-url 'ftp://h:1'"),
        ([*VLLM, "http://u:p@h:1"], "--vllm-url"),
        ([*VLLM, "http://h:99999"], "--vllm-url"),
        ([*VLLM, "http://h:1\r\nX: y"], "--vllm-url"),
        ([*VLLM, "http://h:1", "--vllm-weight-sync", "adapter"], "needs --lora-rank"),
        ([*VLLM, "http://h:1", "--vllm-timeout-seconds", "600"], "--distributed-timeout-minutes"),
        ([*VLLM, "http://h:1", "--vllm-api-key-file", "/nowhere"], "--vllm-api-key-file /nowhere"),
        (["--vllm-concurrency", "0"], "--vllm-concurrency 0: need at least 1"),
        (["--vllm-backoff-seconds", "0"], "--vllm-backoff-seconds 0.0: need above 0"),
        (["--vllm-max-retries", "-1"], "--vllm-max-retries -1: need at least 0"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], message: str) -> None:
    config = parse_args(flags)
    with pytest.raises(ValueError, match=message):
        check_fields(config)
        check_vllm(config)


def test_urls() -> None:
    config = parse_args([*VLLM, "http://127.0.0.1:8000/, https://[::1]:80/base,http://a/v1/"])
    assert server_urls(config) == ["http://127.0.0.1:8000", "https://[::1]:80/base", "http://a"]
