"""How ranks meet: on machines that do not know their own name, and what a start that waits says."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_phf.runtime import rendezvous
from megatron_phf.runtime.environment import for_children, torchrun
from tests.launch import environment, free_port

_MINUTE = timedelta(minutes=1)
_JOB = """
import torch, torch.distributed as dist
from megatron_phf.runtime.device import init_distributed
init_distributed(0, 1)
ones = torch.ones(1)
dist.all_reduce(ones)
print(f"the sum is {ones.item()}", end=" ", flush=True)
dist.destroy_process_group()
"""
# Ends with the words after it, on a machine of a loopback interface alone.
_MACHINE = """
set -e
ip link set lo up
hostname nowhere.invalid
mount --bind "$1" /etc/hosts
[ "$2" != ipv6 ] || ip addr del 127.0.0.1/8 dev lo
shift 2
exec "$@"
"""
_ALONE = ["unshare", "--uts", "--net", "--mount", "bash", "-c", _MACHINE, "machine"]


def _can_play_machines() -> bool:
    if not all(map(shutil.which, ("unshare", "ip", "hostname", "mount"))):
        return False
    done = subprocess.run([*_ALONE, "/etc/hosts", "", "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("kind", ["ipv4", "ipv6"])
def test_ranks_meet_on_a_machine_whose_name_nobody_knows(kind: str, tmp_path: Path) -> None:
    if not _can_play_machines():
        pytest.skip("needs root, and namespaces")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (tmp_path / "job.py").write_text(_JOB)
    done = subprocess.run(
        [*_ALONE, str(tmp_path / "hosts"), kind, *torchrun(2), str(tmp_path / "job.py")],
        env=for_children(environment()), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.count("the sum is 2.0") == 2


def _until(capfd: pytest.CaptureFixture, text: str) -> None:
    """Wait for ``text`` on standard error, for as long as pytest lets a test run."""
    said = ""
    while text not in said:
        said += capfd.readouterr().err


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], threading.Thread]:
    """Starts an impatient rank of two in a thread, by torchrun's environment."""
    monkeypatch.setattr(rendezvous, "_SILENT_SECONDS", 0.01)

    def start(rank: int, port: int) -> threading.Thread:
        variables = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": True}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        target = rendezvous.store_of_this_start
        thread = threading.Thread(target=target, args=(_MINUTE,), daemon=True)
        thread.start()
        return thread

    return start


def _agents_store(port: int) -> dist.TCPStore:
    return dist.TCPStore("localhost", port, 2, True, _MINUTE, wait_for_workers=False)


def test_a_start_that_waits_names_the_ranks_that_are_missing(waiting, capfd) -> None:
    store = _agents_store(0)
    thread = waiting(0, store.port)
    _until(capfd, "waits for rank(s) [1] to start")
    rendezvous._join(store, 1)
    thread.join()


def test_a_rank_that_reaches_nobody_names_the_address(waiting, capfd) -> None:
    port = free_port()
    thread = waiting(1, port)
    _until(capfd, f"waits for others to meet at localhost:{port}")
    store = _agents_store(port)
    rendezvous._invite(store, {1}, _MINUTE)
    thread.join()


def test_a_start_that_does_not_wait_says_nothing(capfd: pytest.CaptureFixture) -> None:
    with rendezvous.said(lambda: "nobody"):
        pass
    assert capfd.readouterr().err == ""


def test_only_a_lone_machine_talks_over_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "nowhere.invalid")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for local, interface in (("2", None), ("4", "lo")):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        rendezvous.reach_own_machine()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
