"""Weights to a server over vLLM's weight-transfer API: messages, order, refusals, deaths."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_phf.config.flags import parse_args
from megatron_phf.demo.task import make_hf_directory
from megatron_phf.rollout.vllm import colocated, ways, wire
from megatron_phf.rollout.vllm.control import Control
from megatron_phf.rollout.vllm.http import Patience
from megatron_phf.rollout.vllm.server import VllmServer
from megatron_phf.rollout.vllm.transfer import _Round, messages
from megatron_phf.rollout.vllm.ways import WAYS, Ipc, TorchDistributed
from megatron_phf.runtime import device, private_names
from tests.fake_vllm import FakeVllm, LazyGroup

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


def send(
    controls: list[Control],
    links: dict,
    tensors: dict,
    most: int = 4000,
    backend: str = "torch_distributed",
) -> dict:
    """One attempt; how many messages it took, and what came of it."""
    way = WAYS[backend](5.0)
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


@pytest.fixture
def nccl_groups(monkeypatch: pytest.MonkeyPatch) -> list[LazyGroup]:
    """The trainer's groups, from now on as NCCL's (see ``LazyGroup``)."""
    groups: list[LazyGroup] = []

    def join(store: dist.Store, rank: int, size: int, seconds: float, cuda: bool) -> LazyGroup:
        def meet() -> dist.Store:
            if not isinstance(store, dist.HashStore):
                return store
            meeting = wire.offer(size, seconds)  # as torch: the first call makes the identity
            store.set("0", str(meeting.port).encode().ljust(128, b"\0"))
            return meeting

        groups.append(LazyGroup(rank, meet, timedelta(seconds=seconds)))
        return groups[-1]

    monkeypatch.setattr(wire, "join", join)
    return groups


@pytest.mark.parametrize("backend", ["torch_distributed", "nccl"])
def test_no_side_waits_for_the_other_where_calls_wait_in_the_host(
    directory: Path, nccl_groups: list[LazyGroup], backend: str
) -> None:
    """Nor for a server that dies amid a message, whose group is aborted and made anew."""
    tensors = load_file(directory / "model.safetensors")
    how = {"transfer": True, "backend": backend, "lazy": True}
    links: dict = {}
    with (
        FakeVllm(str(directory), **how) as lives,
        FakeVllm(str(directory), **how, die_at_messages=(3,)) as dies,
    ):
        controls = [control(lives), control(dies)]
        outcome = send(controls, links, tensors, backend=backend)
        assert (outcome["refused"], outcome["gone"]) == (None, [dies.url])
        dead, other = sorted(nccl_groups, key=lambda group: not group.aborted.is_set())
        assert dead.aborted.is_set() and not other.aborted.is_set()
        assert send(controls[1:], links, tensors, backend=backend)["gone"] == []
        for server in (lives, dies):
            assert server.received.keys() == tensors.keys()
            assert all(torch.equal(server.received[k], v) for k, v in tensors.items())


def test_a_server_that_refuses_to_meet_leaves_no_call_waiting(
    directory: Path, nccl_groups: list[LazyGroup]
) -> None:
    tensors = load_file(directory / "model.safetensors")
    with FakeVllm(str(directory), transfer=False) as server:
        outcome = send([control(server)], {}, tensors, backend="nccl")
    assert "Weight transfer not configured" in outcome["refused"]
    assert [group.aborted.is_set() for group in nccl_groups] == [True]


@pytest.mark.parametrize("before", [None, "0"])
def test_torchs_watchdog_has_no_say_over_the_groups(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """It would end the process where a server dies."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    made = lambda *arguments: os.environ[name]  # noqa: E731
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    assert wire.join(dist.HashStore(), 0, 2, 5.0, cuda=True) == "1"
    assert os.environ.get(name) == before


@pytest.mark.parametrize("expandable", [True, False])
def test_what_workers_map_is_in_no_expandable_segment(
    monkeypatch: pytest.MonkeyPatch, expandable: bool
) -> None:
    """``pidfd_getfd``, which those take, is refused in containers; the user's settings stay."""
    events: list[str] = []
    empty, user = torch.empty, "max_split_size_mb:64"
    settings = f"{user},expandable_segments:True" if expandable else user

    def allocate(*arguments: object, **how: object) -> torch.Tensor:
        events.append("allocated")
        return empty(*arguments, **{**how, "device": "cpu"})

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    monkeypatch.setattr(private_names, "set_allocator", events.append)
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(ways, "MESSAGE_BYTES", 64)
    uuid = lambda index: SimpleNamespace(uuid="GPU-1")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", uuid)
    monkeypatch.setattr(ways.parallel, "gather_objects", lambda value: [{}])
    said = Ipc(5.0).message([("w", torch.arange(3.0))])
    assert said["tensor_sizes"] == [12]
    off = f"{user},expandable_segments:False"
    assert events == [off if expandable else user, "allocated", settings]


def test_ranks_give_their_cached_memory_back_before_servers_wake(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank, and after everything that may have filled the cache."""

    def on_every_rank(action: Callable[[], None]) -> None:
        action()
        server.log.append(("on every rank", {}))

    monkeypatch.setattr(colocated, "on_every_rank", on_every_rank)
    monkeypatch.setattr(device, "synchronize", lambda: server.log.append(("done", {})))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: server.log.append(("empty", {})))
    monkeypatch.setattr(colocated, "on_first_rank", lambda action, *a: action(*a))
    flags = ["--vllm-colocated", "--vllm-weight-sync", "torch_distributed"]
    with FakeVllm(str(directory), transfer=True) as server:
        for more in (flags, flags[1:]):
            beds = colocated.Beds([control(server).server], parse_args(more))
            beds.sleep()
            beds.wake_weights()
            beds.wake_cache()
    first = ["done", "empty", "on every rank"]
    wakes = [*first, "/wake_up?tags=weights", *first, "/wake_up?tags=kv_cache"]
    assert paths(server) == ["/sleep?level=2&mode=wait", *wakes]
