"""Checkpoints on the disk: whole or not visible, checked before use, old ones removed.

    DIR/latest_checkpointed_iteration.txt    written last
    DIR/iter_0000010/                        megatron-core's torch_dist files
    DIR/iter_0000010/checkpoint.json         sizes and sha256 of the files, configuration, versions
    DIR/iter_0000010/hf/                     configuration and tokenizer of --hf-model
    DIR/iter_0000010.megatron_phf-partial/   a save that goes on, or was interrupted

Plain Python, no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from typing import Any

from megatron_phf.files.foreign import parse_json
from megatron_phf.files.replace import OLD, PARTIAL, free_number, write_json, write_text

TRACKER, MANIFEST = "latest_checkpointed_iteration.txt", "checkpoint.json"
RELEASE = "release"  # Megatron's name for weights without a run: converted ones
FORMAT = 1
_CHUNK = 2**22


def iteration_directory(directory: str, iteration: int) -> str:
    """Where the checkpoint of ``iteration`` lies (Megatron's name)."""
    return os.path.join(directory, f"iter_{iteration:07d}")


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: str) -> dict[str, Any]:
    """Size and sha256 of a file; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def start(directory: str, iteration: int) -> None:
    """Make an empty directory beside the final one."""
    partial = iteration_directory(directory, iteration) + PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)


def partial_directory(directory: str, iteration: int) -> str:
    """Where a save writes until it is complete."""
    return iteration_directory(directory, iteration) + PARTIAL


def files_below(directory: str) -> list[str]:
    """Relative paths of all files but the manifest, sorted."""
    found = (
        os.path.relpath(os.path.join(parent, name), directory)
        for parent, _, names in os.walk(directory)
        for name in names
    )
    return sorted(name for name in found if name != MANIFEST)


def settle(directory: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Bring files of ``directory`` onto the disk; their fingerprints."""
    found = {}
    for name in names:
        path = os.path.join(directory, name)
        _fsync(path)
        found[name] = fingerprint(path)
    return found


def publish(directory: str, iteration: int, manifest: dict[str, Any]) -> None:
    """Make a completely written checkpoint visible, its tracker last."""
    final, partial = (
        iteration_directory(directory, iteration),
        partial_directory(directory, iteration),
    )
    write_json(os.path.join(partial, MANIFEST), manifest)
    for parent, _, _ in os.walk(partial):
        _fsync(parent)
    shutil.rmtree(final + OLD, ignore_errors=True)
    if _is_ours(final):  # damaged, or of a run that was told to start before it
        os.rename(final, final + OLD)
    elif os.path.lexists(final):
        os.rename(final, f"{final}.{free_number([final])}")
    os.rename(partial, final)
    _fsync(directory)
    write_text(os.path.join(directory, TRACKER), str(iteration))
    _fsync(directory)
    shutil.rmtree(final + OLD, ignore_errors=True)


def _is_ours(checkpoint: str) -> bool:
    """Whether this program wrote all of it: Megatron's own checkpoints have no manifest."""
    try:
        return set(files_below(checkpoint)) <= read_manifest(checkpoint)["files"].keys()
    except ValueError:
        return False


def discard(directory: str, iteration: int) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(partial_directory(directory, iteration), ignore_errors=True)


def saved_iterations(directory: str) -> list[int]:
    """Iterations of the checkpoints in ``directory``, newest first, damaged ones included.

    Up to the tracker's: a newer one was not complete when the tracker was written, or the user
    has gone back.  Without a readable tracker, all.
    """
    if not os.path.isdir(directory):
        return []
    matches = (re.fullmatch(r"iter_(\d{7,})", name) for name in os.listdir(directory))
    found = sorted((int(m[1]) for m in matches if m), reverse=True)
    try:
        with open(os.path.join(directory, TRACKER), encoding="utf-8") as f:
            newest = int(f.read())
    except (OSError, ValueError):
        return found
    return [i for i in found if i <= newest] or found


def recorded_rendering(directory: str) -> dict[str, str]:
    """How the run whose checkpoints lie in ``directory`` makes prompts; empty where unknown."""
    for iteration in saved_iterations(directory):
        with contextlib.suppress(ValueError):  # a damaged one: all of a run say the same
            manifest = read_manifest(iteration_directory(directory, iteration))
            return dict(manifest.get("rendering") or {})
    return {}


def keep_last(directory: str, count: int) -> None:
    """Remove all checkpoints but the newest ``count``, and what interrupted saves left."""
    for iteration in saved_iterations(directory)[count:]:
        path = iteration_directory(directory, iteration)
        if not _is_ours(path):
            continue
        # Renamed first: half a checkpoint never has a checkpoint's name.
        os.rename(path, path + OLD)
        shutil.rmtree(path + OLD, ignore_errors=True)


def remove_leftovers(directory: str) -> None:
    """Remove what interrupted saves and removals left; only for whoever holds the lock."""
    for name in os.listdir(directory) if os.path.isdir(directory) else []:
        if re.fullmatch(rf"iter_\d+({re.escape(PARTIAL)}|{re.escape(OLD)})", name):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)


def converted_weights(directory: str | None) -> str | None:
    """The weights that tools/convert_checkpoint.py wrote into ``directory``, if it is such a one.

    Raises:
        ValueError: a file is missing or truncated.
    """
    tracker = os.path.join(directory or "", TRACKER)
    if directory is None or not os.path.isfile(tracker):
        return None
    with open(tracker, encoding="utf-8", errors="replace") as f:
        if f.read(len(RELEASE) + 1).strip() != RELEASE:
            return None
    path = os.path.join(directory, RELEASE)
    check_sizes(path, read_manifest(path))
    return path


def newest_weights(directory: str) -> str:
    """Converted weights, or the newest whole checkpoint of a run in ``directory``.

    Raises:
        ValueError: there is none.
    """
    converted = converted_weights(directory)
    if converted is not None:
        return converted
    for iteration in saved_iterations(directory):
        path = iteration_directory(directory, iteration)
        try:
            check_sizes(path, read_manifest(path))
        except ValueError:  # an older one will do
            continue
        return path
    raise ValueError(f"{directory}: no whole checkpoint in it")


def check_sizes(path: str, manifest: dict[str, Any]) -> None:
    """Raise ValueError where a file of the checkpoint ``path`` is missing or truncated."""
    for name, expected in manifest["files"].items():
        file = os.path.join(path, name)
        size = os.path.getsize(file) if os.path.isfile(file) else None
        if size != expected["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not {expected['bytes']}"
            raise ValueError(f"{file}: {what}; copy the checkpoint again")


def read_manifest(path: str) -> dict[str, Any]:
    """``checkpoint.json`` of one checkpoint.

    Raises:
        ValueError: missing, damaged, or of a later version of this program.
    """
    name = os.path.join(path, MANIFEST)
    try:
        with open(name, encoding="utf-8") as f:
            manifest = parse_json(f.read())
        files, version = manifest["files"], manifest["format"]
        good = all(os.path.normpath(n) == n and not n.startswith(("/", "..")) for n in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: missing or damaged ({error})") from error
    if version > FORMAT or not good:
        raise ValueError(f"{name}: format {version} of a later version of megatron_phf, or damaged")
    return manifest


def damage(path: str, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with ``files`` (a part of the manifest's), one text a file."""
    problems = []
    for name, expected in files.items():
        try:
            found = fingerprint(os.path.join(path, name))
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror})")
            continue
        if found["bytes"] != expected["bytes"]:
            problems.append(f"{name}: {found['bytes']} bytes, not {expected['bytes']}")
        elif found["sha256"] != expected["sha256"]:
            problems.append(f"{name}: its checksum is wrong")
    return problems
