"""Signals and locks, in processes of their own."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_phf.runtime.run_lock import RunLock
from tests.launch import REPO

WAITS = """
import time
from megatron_phf.runtime.signals import StopSignals
s = StopSignals()
s.install()
print("ready", flush=True)
time.sleep(60)
"""
HOLDS = """
import sys, time
from megatron_phf.runtime.run_lock import RunLock
lock = RunLock(sys.argv[1], "--save")
print("ready", flush=True)
time.sleep(60)
"""
FORKS = "import ctypes; fork = ctypes.PyDLL(None).fork"


def start(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_the_second_signal_ends_the_process_at_once() -> None:
    process = start(WAITS)
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_ctrl_c_may_arrive_twice(tmp_path: Path) -> None:
    """From the terminal, and handed on by torchrun; a later one is meant."""
    # Tests that run in a shell's background inherit that it is ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    # By a clock that stands still until this process says otherwise.
    still = "import os, time; time.monotonic = lambda: 9.0 * os.path.exists(sys.argv[1])\n"
    process = start(f"import sys\n{still}{heard}{WAITS}", str(tmp_path / "later"))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
    (tmp_path / "later").touch()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As nohup leaves SIGHUP."""
    process = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + WAITS)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_what_a_job_script_ignores_for_torchrun_reaches_the_ranks() -> None:
    """``trap "" USR1`` is inherited: a rank that left it ignored would never save and requeue."""
    ignored = "import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
    process = start(ignored + WAITS)
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 128 + signal.SIGUSR1


def test_a_directory_takes_one_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_phf.runtime.run_lock._PATIENCE_SECONDS", 0.5)
    process = start(HOLDS, str(tmp_path))
    try:
        with pytest.raises(ValueError, match=rf"--save {tmp_path} is in use by .*{process.pid}"):
            RunLock(str(tmp_path), "--save")
    finally:
        process.kill()  # SIGKILL: nothing is cleaned up
        process.wait()
    lock = RunLock(str(tmp_path), "--save")
    lock.release()


@pytest.mark.parametrize("fork", ["fork = os.fork", FORKS])
def test_the_lock_ends_with_its_process_not_with_that_ones_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: str
) -> None:
    """One forked by Python, or by a library that Python knows nothing of, as MPI does."""
    monkeypatch.setattr("megatron_phf.runtime.run_lock._PATIENCE_SECONDS", 0.0)
    child = f"import os\n{fork}\nif not fork(): time.sleep(3), os._exit(0)\n"
    process = start(HOLDS.replace("print(", child + "print("), str(tmp_path))
    process.kill()
    process.wait()
    RunLock(str(tmp_path), "--save").release()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(ValueError, match=r"--save .*: its file system has no locks \(No locks ava"):
        RunLock(str(tmp_path), "--save")


def test_a_lock_of_another_program_stays(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("mine")
    with pytest.raises(ValueError, match=r"--save .*its run.lock is of another program"):
        RunLock(str(tmp_path), "--save")
    assert (tmp_path / "run.lock").read_text() == "mine"


def test_a_run_that_is_still_dying_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_phf.runtime.run_lock._PATIENCE_SECONDS", 60.0)
    process = start(HOLDS, str(tmp_path))
    begin = time.monotonic()
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
    RunLock(str(tmp_path), "--save").release()
    assert time.monotonic() - begin > 0.5
    killer.wait()
    process.wait()
