"""Every path that a job reads or writes, and what of it does not go together.

Nothing that a job did not write may be lost to it: its outputs must not meet what it reads or one
another, must be free or its own earlier ones, and must be writable before anything is computed.
No import of torch.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import os
import re
import tempfile
from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_directories
from megatron_phf.files.replace import PARTIAL, is_copy, not_ours
from megatron_phf.rollout.vllm.flags import sync_directory, syncs_adapters, syncs_by_disk
from megatron_phf.train.checkpoint_files import RELEASE, TRACKER


class Role(enum.Enum):
    """What a job does with a path."""

    READ = "reads"
    MODEL = "reads from the directory"  # nothing may be written among its files
    CHECKPOINTS = "resumes from"
    FILE = "writes"
    DIRECTORY = "writes into"
    REPLACED = "replaces"  # with all that is in it, which must be ours
    WHOLE = "puts a directory in the place of"  # whatever is there is kept elsewhere


_READS = (Role.READ, Role.MODEL, Role.CHECKPOINTS)


@dataclass(frozen=True)
class JobPath:
    """A path and the flag that names it."""

    flag: str
    path: str
    role: Role

    @functools.cached_property
    def _above(self) -> set[str | tuple[int, int]]:
        """The path and all directories above it: by name, and by device and inode."""
        found: set[str | tuple[int, int]] = set()
        path, below = os.path.realpath(self.path), ""
        while path != below:
            found.add(path)
            with contextlib.suppress(OSError):
                status = os.stat(path)
                found.add((status.st_dev, status.st_ino))
            path, below = os.path.dirname(path), path
        return found

    @functools.cached_property
    def _here(self) -> set[str | tuple[int, int]]:
        path = os.path.realpath(self.path)
        with contextlib.suppress(OSError):
            status = os.stat(path)
            return {path, (status.st_dev, status.st_ino)}
        return {path}

    def contains(self, other: JobPath) -> bool:
        """Whether ``other`` is this path or lies below it, symbolic links and mounts followed."""
        return not self._here.isdisjoint(other._above)

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"


def _named(pairs: dict[str, str | None], role: Role) -> list[JobPath]:
    return [JobPath(flag, path, role) for flag, path in pairs.items() if path is not None]


def read_paths(config: Config) -> list[JobPath]:
    """What a job reads."""
    data, rollout, tokenizer = config.data, config.rollout, config.tokenizer
    sentencepiece = tokenizer.tokenizer_type == "SentencePieceTokenizer"
    teachers = teacher_directories(config).values()
    files = {
        "--data": data.data,
        "--eval-data": config.evaluation.eval_data,
        "--replay-file": rollout.replay_file,
        "--student-template": data.student_template,
        "--teacher-template": data.teacher_template,
        "--vllm-api-key-file": config.vllm.vllm_api_key_file,
        "--tokenizer-model": tokenizer.tokenizer_model if sentencepiece else None,
    }
    models = {
        "--hf-model": config.model.hf_model,
        "--lora-adapter": config.lora.lora_adapter,
        "--tokenizer-model": None if sentencepiece else tokenizer.tokenizer_model,
    }
    return [
        *_named(files, Role.READ),
        *_named(models, Role.MODEL),
        *(JobPath("--teacher-hf-model", path, Role.MODEL) for path in teachers),
        *_named({"--load": config.checkpoint.load}, Role.CHECKPOINTS),
    ]


def _in_output_dir(config: Config, name: str, role: Role) -> JobPath:
    path = os.path.join(config.output.output_dir, name)
    return JobPath(f"--output-dir (its {name})", path, role)


def served_paths(config: Config) -> list[JobPath]:
    """Where vLLM servers read the student's weights from."""
    if config.rollout.rollout_engine != "vllm" or not syncs_by_disk(config):
        return []
    role = Role.DIRECTORY if syncs_adapters(config) else Role.REPLACED
    if config.vllm.vllm_sync_dir is None:
        return [_in_output_dir(config, "vllm", role)]
    return [JobPath("--vllm-sync-dir", sync_directory(config), role)]


def _embedded_paths(config: Config) -> list[JobPath]:
    names = ("summary.json", "report.png", "train.jsonl", "heldout.jsonl")
    files = [_in_output_dir(config, name, Role.FILE) for name in names]
    models = ("initial_model", "base_model")
    return [*files, *(_in_output_dir(config, name, Role.REPLACED) for name in models)]


def training_paths(config: Config) -> list[JobPath]:
    """What a training job reads and writes."""
    output = JobPath("--output-dir", config.output.output_dir, Role.DIRECTORY)
    if config.is_embedded:
        return [output, *_embedded_paths(config)]
    names = ["run.json", "run.lock", "export_probe.safetensors"]
    if config.output.metrics_file is None:
        names.append("metrics.jsonl")
    if config.evaluation.eval_data is not None:
        names.append("evaluations.jsonl")
    files = {
        "--metrics-file": config.output.metrics_file,
        "--record-rollouts": config.rollout.record_rollouts,
    }
    exports = {"--save-hf": config.output.save_hf, "--save-adapter": config.lora.save_adapter}
    board = [_in_output_dir(config, "tensorboard", Role.DIRECTORY)]
    return [
        *read_paths(config),
        output,
        *_named({"--save": config.checkpoint.save}, Role.DIRECTORY),
        *(_in_output_dir(config, name, Role.FILE) for name in names),
        *(board if config.output.tensorboard else []),
        *_named(files, Role.FILE),
        *_named(exports, Role.REPLACED),
        *served_paths(config),
    ]


def evaluation_paths(config: Config) -> list[JobPath]:
    """What a job of ``tools/evaluate.py`` reads and writes."""
    output = JobPath("--output-dir", config.output.output_dir, Role.DIRECTORY)
    return [*read_paths(config), output, *served_paths(config)]


def _lost(one: JobPath, other: JobPath) -> bool:
    """Whether writing ``one`` would lose ``other``, or lie among its files."""
    if one.role in _READS:
        return False
    below = one.contains(other)
    among = other.contains(one) and other.role is Role.MODEL
    if one.role is Role.DIRECTORY:
        files = (Role.READ, Role.FILE)
        return among or (below and other.contains(one) and other.role in files)
    return below or among


def _check_pairs(paths: list[JobPath]) -> None:
    for one, other in itertools.permutations(paths, 2):
        if _lost(one, other):
            below, among = one.contains(other), other.contains(one)
            where = "is" if below and among else "contains" if below else "lies in"
            raise ValueError(
                f"{one} {where} {other}: the job {one.role.value} the first and "
                f"{other.role.value} the second; name another path for {one.flag.split()[0]}"
            )


def _nearest(path: str) -> str:
    """The directory above ``path`` that is there, or the file."""
    path = os.path.dirname(os.path.realpath(path))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _check_form(path: JobPath) -> None:
    """Raise ValueError for what no file system could take."""
    name = path.path
    try:
        good = bool(name.strip()) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        good = False
    if not good:
        raise ValueError(f"{path.flag} {name!r}: no path; name a file or directory")


def _probe(path: JobPath) -> None:
    """Raise OSError unless the path can be made, or written."""
    real = os.path.realpath(path.path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(real + PARTIAL)  # a name that is too long
    whole = path.role is not Role.DIRECTORY  # written beside and renamed
    where = _nearest(real) if whole or not os.path.lexists(real) else real
    if os.path.isfile(where):
        raise NotADirectoryError(f"{where} is a file")
    with tempfile.NamedTemporaryFile(prefix=".megatron_phf-", dir=where) as f:
        f.write(b"\n")
        f.flush()
    if not os.path.lexists(real):
        return
    if path.role is Role.FILE:
        if not os.path.isfile(real):
            raise OSError("is there, and no file")
        with open(real, "ab"):
            pass
    elif path.role in (Role.REPLACED, Role.WHOLE) and os.path.ismount(real):
        raise OSError("is where a file system is mounted; name a directory in it")


def _check_target(path: JobPath, config: Config) -> None:
    """Raise ValueError where a directory that would be replaced is not ours."""
    reason = not_ours(os.path.realpath(path.path))
    if reason is None:
        return
    if path in served_paths(config):
        if is_copy(path.path, str(config.model.hf_model)):
            return
        reason += "; nor is it a copy of --hf-model"
    raise ValueError(
        f"{path} {reason}; nothing but an unchanged export is replaced: move it away, or name "
        "another directory"
    )


def _check_save(config: Config) -> None:
    """Raise ValueError where another run's checkpoints would be written over."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None or not os.path.isdir(save):
        return
    if load is not None and os.path.realpath(load) == os.path.realpath(save):
        return
    found = sorted(n for n in os.listdir(save) if re.fullmatch(r"iter_\d{7,}", n))
    found += [TRACKER] if os.path.isdir(os.path.join(save, RELEASE)) else []
    if found:
        raise ValueError(
            f"--save {save}: has checkpoints already ({found[-1]}), which this run would write "
            f"over; go on from them with --load {save}, or name another directory"
        )


def check_paths(paths: list[JobPath], config: Config) -> None:
    """Raise ValueError for a path that would lose something, or cannot be written.

    It names the flag, for two that meet both, and the remedy.
    """
    for path in paths:
        _check_form(path)
    _check_pairs(paths)
    for path in paths:
        if path.role in _READS:
            continue
        try:
            _probe(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(
                f"{path}: cannot be written ({reason}); name another path, or make it writable"
            ) from error
        if path.role is Role.REPLACED:
            _check_target(path, config)
    if any(path.flag == "--save" for path in paths):
        _check_save(config)
