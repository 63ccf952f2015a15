"""Build and load what makes a CPU build of torch take CUDA tensors; once a version of torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")
# Releases of torch whose private names (torch_names.py) and headers were seen to work.
SEEN = ("2.13",)


def load() -> None:
    """Load the shim into this process, where torch must not be yet: its symbols come first.

    Raises:
        ValueError: see :func:`library`.
    """
    assert "torch" not in sys.modules, "the shim comes before torch"
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


def library(cache: Path | None = None) -> Path:
    """The shim for the installed torch, from the user's cache or built into it.

    Args:
        cache: instead of the user's.

    Raises:
        ValueError: another torch than was seen to work, no compiler, no headers, or no place to
            write; says what to do.
    """
    version, root = _torch()
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + f"{version} {root}".encode()).hexdigest()[:16]
    path = (cache or _cache()) / f"fake_cuda-{version}-{key}.so"
    if not path.exists():
        _build(root, path)
    return path


def _torch() -> tuple[str, Path]:
    """(version, directory) of the installed torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ValueError("the dry run needs torch: pip install torch")
    version, root = importlib.metadata.version("torch"), Path(spec.origin).parent
    if version.partition("+")[0].rpartition(".")[0] not in SEEN:
        raise ValueError(
            f"the dry run uses torch's private names, seen to work with torch {', '.join(SEEN)}; "
            f"this is torch {version}: run it in an environment with one of those"
        )
    if (root / "lib" / "libtorch_cuda.so").exists():
        raise ValueError(
            f"the dry run plays CUDA itself and needs a CPU build of torch; {root} is a CUDA "
            "build: run it in an environment with the CPU build of the same version"
        )
    return version, root


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "megatron_phf"


def _build(root: Path, path: Path) -> None:
    """Into a file of its own, then renamed: two processes may do it at once."""
    if not (root / "include" / "ATen" / "DeviceAccelerator.h").exists():
        raise ValueError(
            f"the dry run needs torch's C++ headers, and {root / 'include'} lacks them: install "
            "torch from its wheel"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as error:
        raise ValueError(
            f"the dry run keeps its library in {path.parent}, which cannot be written ({error}); "
            "set XDG_CACHE_HOME to a directory that can"
        ) from error
    os.close(handle)
    try:
        _compile(root, partial)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _compile(root: Path, output: str) -> None:
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", str(_SOURCE)]
    command += ["-o", output, f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"the dry run builds a small library with g++, which does not run ({error.strerror}): "
            "install it, for example apt-get install g++"
        ) from error
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise ValueError(f"g++ did not build {_SOURCE} (C++20 is needed, g++ 10 or newer):\n{last}")
