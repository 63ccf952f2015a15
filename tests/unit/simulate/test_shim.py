"""The shim: built once a version of torch, by any number of processes; what is missing is said."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_phf.simulate import shim
from tests.launch import REPO

LOADED = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch
assert torch.accelerator.current_accelerator().type == "cuda"
from torch._subclasses import fake_tensor
fake_tensor.init_gpu_context = lambda *args: None
fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
torch.autograd.set_multithreading_enabled(False)
with fake_tensor.FakeTensorMode():
    x = torch.empty(3, 4, device="cuda:0", requires_grad=True)
    (x @ x.T).sum().backward()
assert x.grad.device.type == "cuda" and x.grad.shape == (3, 4)
print("good")
"""


def test_two_processes_build_one_library_that_autograd_takes(tmp_path: Path) -> None:
    """Both find a whole file, whoever was first; a later call builds nothing."""
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(shim.library(tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = set(found)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    written = path.stat().st_mtime_ns
    assert shim.library(tmp_path) == path and path.stat().st_mtime_ns == written
    command = [sys.executable, "-c", LOADED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    assert done.stdout.strip() == "good", done.stderr


def refused(cache: Path) -> str:
    with pytest.raises(ValueError) as caught:
        shim.library(cache)
    return str(caught.value)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = refused(tmp_path / "cache")
    assert "g++, which does not run (No such file or directory): install it" in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_with_a_compiler_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(shutil.which('sh') or '/bin/sh').parent}")
    assert "(C++20 is needed, g++ 10 or newer):\nunrecognized option" in refused(tmp_path / "c")


@pytest.mark.parametrize(
    ("version", "files", "text"),
    [
        ("2.12.1+cpu", (), f"with torch {shim.SEEN[0]}; this is torch 2.12.1+cpu: run it in an"),
        ("2.13.0", ("lib/libtorch_cuda.so",), "is a CUDA build: run it in an environment with the"),
        ("2.13.0", (), "lacks them: install torch from its wheel"),
    ],
)
def test_another_torch(
    version: str, files: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(shim.importlib.metadata, "version", lambda name: version)
    assert text in refused(tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "set XDG_CACHE_HOME to a directory that can" in refused(tmp_path / "file" / "cache")
