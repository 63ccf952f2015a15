"""Whether a checkpoint belongs to this run: its flags, and fingerprints of what the run reads."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from megatron_phf.config import Config, flag_of
from megatron_phf.model import hf_directory
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.train.checkpoint_files import fingerprint

# A flag that decides what the checkpoint's tensors mean, or which problems the next step gets.
_FIXED = (
    *("teacher", "use_distributed_optimizer", "global_batch_size", "seed", "rollout_engine"),
    *("lora_rank", "lora_alpha", "lora_target_modules", "teacher_layer_map"),
)
# Where and how a run computes and writes is free to change.
_FREE = ("parallel", "checkpoint", "output", "embedded", "evaluation")
_READ = ("data", "replay_file", "student_template", "teacher_template", "tokenizer_model")
_MODELS = ("hf_model", "teacher_hf_model")
_SAMPLES, _SAMPLE_BYTES = 64, 2**20


def _sampled(path: str) -> dict[str, Any]:
    """Size and sha256 of 64 MiB spread over a file: weights are too many to read at each start."""
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for i in range(_SAMPLES):
            f.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(f.read(_SAMPLE_BYTES))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}


def inputs(config: Config) -> dict[str, Any]:
    """Field -> fingerprint of the file, or for a model of its configuration and weights."""
    found: dict[str, Any] = {}
    values = {k: v for group in vars(config).values() for k, v in vars(group).items()}
    for name in _READ:
        if values[name] is not None:
            found[name] = fingerprint(values[name])
    for name in _MODELS:
        directory = values[name]
        if directory is not None:
            weights = sorted(n for n in os.listdir(directory) if n.endswith(".safetensors"))
            parts = ["config.json", *weights]
            found[name] = {part: _sampled(os.path.join(directory, part)) for part in parts}
    return found


def copy_model_files(config: Config, partial: str) -> None:
    """Configuration, tokenizer and templates of --hf-model into hf/ of a checkpoint."""
    source, target = config.model.hf_model, os.path.join(partial, "hf")
    assert source is not None
    os.makedirs(target)
    hf_directory.copy_model_files(source, target, model_dtype(config), config.tokenizer)


def check_compatible(path: str, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two manifests that may be meant, as text.

    Raises:
        ValueError: a difference that makes the checkpoint useless; names the flag.
    """
    for name in ("architecture", "dtype"):
        if saved[name] != now[name]:
            flag = "--hf-model" if name == "architecture" else "--dtype"
            raise ValueError(
                f"{path} holds another {name} than {flag} gives: {_shown(saved, now, name)}"
            )
    changes = []
    old = {k: v for group in saved["config"].values() for k, v in group.items()}
    for group, values in now["config"].items():
        for name, value in values.items():
            if name not in old or old[name] == value:
                continue
            text = f"{flag_of(name)} {old[name]} -> {value}"
            if name in _FIXED:
                raise ValueError(
                    f"{path} was saved with {flag_of(name)} {old[name]}, not {value}: it cannot "
                    "go on; give that value, or start anew without --load"
                )
            if group not in _FREE and name not in _READ + _MODELS:
                changes.append(text)
    _check_inputs(path, saved, now)
    return changes


def _shown(saved: dict[str, Any], now: dict[str, Any], name: str) -> str:
    old, new = saved[name], now[name]
    if not isinstance(old, dict):
        return f"{old}, not {new}"
    return ", ".join(f"{k} {v}, not {new.get(k)}" for k, v in old.items() if new.get(k) != v)


def _check_inputs(path: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name in saved["inputs"].keys() | now["inputs"].keys():
        old, new = saved["inputs"].get(name), now["inputs"].get(name)
        if old != new:
            sizes = ""
            if name in _READ and old and new and old["bytes"] != new["bytes"]:
                sizes = f" (it had {old['bytes']} bytes and has {new['bytes']})"
            raise ValueError(
                f"{flag_of(name)} {_value(now, name)}: not what the run of {path} read{sizes}; "
                "restore it, or start anew without --load"
            )


def _value(manifest: dict[str, Any], name: str) -> Any:
    return next(group[name] for group in manifest["config"].values() if name in group)
