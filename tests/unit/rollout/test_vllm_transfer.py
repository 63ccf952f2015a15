"""Weights to a server over vLLM's weight-transfer API: messages, order, refusals, deaths."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_phf.demo.task import make_hf_directory
from megatron_phf.rollout.vllm.control import Control
from megatron_phf.rollout.vllm.http import Patience
from megatron_phf.rollout.vllm.server import VllmServer
from megatron_phf.rollout.vllm.transfer import _Round, messages
from megatron_phf.rollout.vllm.ways import TorchDistributed
from tests.fake_vllm import FakeVllm

BEGIN = ["/pause?mode=wait&clear_cache=true", "/start_weight_update"]
END = ["/finish_weight_update", "/resume"]
INIT = "/init_weight_transfer_engine"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transfer")
    make_hf_directory(str(path), seed=5)
    return path


def control(server: FakeVllm) -> Control:
    return Control(VllmServer(server.url, Patience(5.0, 40, 0.05)))


def send(controls: list[Control], links: dict, tensors: dict, most: int = 4000) -> dict:
    """One attempt; how many messages it took, and what came of it."""
    way = TorchDistributed(5.0)
    attempt = _Round(controls, links, way)
    attempt.begin()
    count = 0
    for message in messages(tensors.items(), most):
        attempt.send(way.message(message), message)
        count += 1
    attempt.end("v1")
    gone, refused = [], None
    try:
        gone = attempt.settle(time.monotonic() + 5)
    except ValueError as error:
        refused = str(error)
    return {"messages": count, "gone": gone, "refused": refused}


def paths(server: FakeVllm) -> list[str]:
    return [path for path, _ in server.log]


def test_messages_are_bounded_and_in_order() -> None:
    sizes = [3, 5, 2, 9, 1, 1, 7]
    weights = [(f"w{i}", torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    found = [[len(t) for _, t in message] for message in messages(weights, 8)]
    assert found == [[3, 5], [2], [9], [1, 1], [7]]  # one that is larger goes alone
    names = [name for message in messages(weights, 8) for name, _ in message]
    assert names == [name for name, _ in weights]


def test_two_servers_get_every_tensor_in_vllms_order(directory: Path) -> None:
    tensors = {k: v + 1 for k, v in load_file(directory / "model.safetensors").items()}
    links: dict = {}
    with (
        FakeVllm(str(directory), transfer=True) as first,
        FakeVllm(str(directory), transfer=True) as second,
    ):
        controls = [control(first), control(second)]
        for _ in range(2):
            outcome = send(controls, links, tensors)
            assert outcome["messages"] > 5
            assert (outcome["refused"], outcome["gone"]) == (None, [])
        for server in (first, second):
            updates = ["/update_weights"] * outcome["messages"]
            one = [*BEGIN, *updates, *END]
            assert paths(server) == [INIT, *one, *one]
            assert server.received.keys() == tensors.keys()
            assert all(torch.equal(server.received[k], v) for k, v in tensors.items())
        assert controls[0].version() == "v1"


def test_a_server_that_dies_amid_a_message_is_waited_for_and_gets_all(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    links: dict = {}
    with (
        FakeVllm(str(directory), transfer=True, die_at_messages=(3,)) as dies,
        FakeVllm(str(directory), transfer=True) as lives,
    ):
        outcome = send([control(lives), control(dies)], links, tensors)
        assert (outcome["refused"], outcome["gone"]) == (None, [dies.url])
        assert lives.received.keys() == tensors.keys() and paths(lives)[-1] == "/resume"
        # It answers again, and says that it has nothing of ours.
        again = control(dies)
        assert again.version() == "default"
        assert send([again], links, tensors)["gone"] == []
        assert dies.received.keys() == tensors.keys()
        assert all(torch.equal(dies.received[k], v) for k, v in tensors.items())
        assert paths(dies).count(INIT) == 2 and again.version() == "v1"


def test_a_server_that_was_restarted_between_is_met_anew(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    links: dict = {}
    with FakeVllm(str(directory), transfer=True, down_seconds=0.0) as server:
        one = control(server)
        assert send([one], links, tensors)["gone"] == []
        server.restart()
        assert one.version() == "default" and not server.received
        assert send([one], links, tensors)["gone"] == []
        assert server.received.keys() == tensors.keys() and one.version() == "v1"
        assert paths(server).count(INIT) == 2


@pytest.mark.parametrize(
    ("settings", "spoil", "message"),
    [
        ({}, "shape", "/update_weights: status 500: 'no parameter model.norm.weight of shape [7]'"),
        ({}, "name", "/update_weights: status 500: 'no parameter model.other of shape [8]'"),
        ({"transfer": False}, "", f"{INIT}: status 500: 'Weight transfer not configured.'"),
        ({"dev_mode": False}, "", f"{INIT}: status 404: 'Not Found'; start the server with VLLM_S"),
    ],
)
def test_what_a_server_refuses_is_one_clear_error(
    directory: Path, settings: dict, spoil: str, message: str
) -> None:
    tensors = load_file(directory / "model.safetensors")
    if spoil == "shape":
        tensors["model.norm.weight"] = torch.zeros(7)
    elif spoil:
        tensors["model.other"] = torch.zeros(8)
    with FakeVllm(str(directory), **{"transfer": True, **settings}) as server:
        outcome = send([control(server)], {}, tensors)
    assert outcome["refused"].startswith(f"--vllm-url {server.url}: {message}")
    assert outcome["gone"] == []


def test_an_update_that_a_killed_job_left_open_is_closed_first(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    with FakeVllm(str(directory), transfer=True) as server:
        killed = control(server)
        link = TorchDistributed(5.0).connect(killed, 1)
        killed.begin_update()
        del link
        outcome = send([control(server)], {}, tensors)
        assert outcome["refused"] is None and server.received.keys() == tensors.keys()
        start = "/start_weight_update"
        expected = [start, INIT, BEGIN[0], start, "/finish_weight_update", start]
        assert paths(server)[2:8] == expected
