"""Whether a checkpoint belongs to this run: its flags, and fingerprints of what the run reads."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from megatron_phf.config.settings import Config, flag_of
from megatron_phf.config.teachers import teacher_directories
from megatron_phf.files.replace import MARKER
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.train.checkpoint_files import fingerprint
from megatron_phf.weights import hf_directory
from megatron_phf.weights.model_files import TEMPLATES

# A flag that decides what the checkpoint's tensors mean, or which problems the next step gets.
_FIXED = (
    *("teacher", "use_distributed_optimizer", "global_batch_size", "seed", "rollout_engine"),
    *("lora_rank", "lora_alpha", "lora_target_modules", "teacher_layer_map"),
    *("privileged", "collapse_steps", "rollouts_per_problem"),
)
# Where and how a run computes and writes is free to change.
_FREE = ("parallel", "checkpoint", "output", "embedded", "evaluation")
_READ = ("data", "replay_file", "student_template", "teacher_template", "tokenizer_model")
_MODELS = ("hf_model", "teacher_hf_model")
# Beside config.json and the weights: tokenizers with their templates and code, generation settings.
_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_NOT_READ = re.compile(r"(readme|licen[cs]e|notice|use_policy).*", re.IGNORECASE)
_SAMPLES, _SAMPLE_BYTES = 64, 2**20
_SHOWN = 3  # files that an error names


def _sampled(path: str) -> dict[str, Any]:
    """Size and sha256 of 64 MiB spread over a file: weights are too many to read at each start."""
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for i in range(_SAMPLES):
            f.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(f.read(_SAMPLE_BYTES))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}


def _small_files(directory: str) -> dict[str, Any]:
    """Fingerprints of what may decide about prompts and stop tokens, by name.

    More than an export copies (``weights.model_files``): what no tokenizer of today reads, too.
    """
    names = [n for n in os.listdir(directory) if n.endswith(_SMALL) and not _NOT_READ.match(n)]
    more = os.path.join(directory, TEMPLATES)
    names += [os.path.join(TEMPLATES, n) for n in (os.listdir(more) if os.path.isdir(more) else [])]
    paths = {name: os.path.join(directory, name) for name in sorted(names)}
    return {n: fingerprint(p) for n, p in paths.items() if os.path.isfile(p) and n != MARKER}


def _model_files(directory: str) -> dict[str, Any]:
    """Of what is read of a model."""
    weights = sorted(n for n in os.listdir(directory) if n.endswith(".safetensors"))
    sampled = {part: _sampled(os.path.join(directory, part)) for part in ["config.json", *weights]}
    return _small_files(directory) | sampled


def _teacher_files(config: Config) -> dict[str, Any]:
    """Of all teachers; of those with a name behind their place and name, which decide too."""
    found: dict[str, Any] = {}
    for number, (name, directory) in enumerate(teacher_directories(config).items(), start=1):
        where = f"{number}:{name}/" if name else ""
        found |= {where + file: known for file, known in _model_files(directory).items()}
    return found


def inputs(config: Config) -> dict[str, Any]:
    """Field -> fingerprint of the file, or of each file in a directory that is read."""
    found: dict[str, Any] = {}
    values = {k: v for group in vars(config).values() for k, v in vars(group).items()}
    for name in _READ:
        if values[name] is not None:
            read = _small_files if os.path.isdir(values[name]) else fingerprint
            found[name] = read(values[name])
    if config.model.hf_model is not None:
        found["hf_model"] = _model_files(config.model.hf_model)
    if config.teacher.teacher_hf_model is not None:
        found["teacher_hf_model"] = _teacher_files(config)
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
    _check_rendering(path, saved.get("rendering") or {}, now.get("rendering") or {})
    return changes


def _shown(saved: dict[str, Any], now: dict[str, Any], name: str) -> str:
    old, new = saved[name], now[name]
    if not isinstance(old, dict):
        return f"{old}, not {new}"
    return ", ".join(f"{k} {v}, not {new.get(k)}" for k, v in old.items() if new.get(k) != v)


def _check_inputs(path: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name in saved["inputs"].keys() | now["inputs"].keys():
        old, new = saved["inputs"].get(name), now["inputs"].get(name)
        what = _changed(name, old, new)
        if what is not None:
            raise ValueError(
                f"{flag_of(name)} {_value(now, name)}: {what}not what the run of {path} read"
                f"{_sizes(old, new)}; restore it, or start anew without --load"
            )


def _check_rendering(path: str, saved: dict[str, str], now: dict[str, str]) -> None:
    """Equal files can make other prompts: the program that reads them, or its surroundings."""
    name = "prompts_sha256"
    if saved.get(name, now.get(name)) != now.get(name, saved.get(name)):
        raise ValueError(
            f"--load: the tokenizer and its chat template make other prompts than in the run of "
            f"{path}, of the same files; install the versions of transformers and tokenizers that "
            "it had, or start anew without --load"
        )


def _changed(field: str, old: Any, new: Any) -> str | None:
    """None where two fingerprints are equal; else the file of a directory that differs."""
    if old == new:
        return None
    if not (old and new) or "bytes" in old or "bytes" in new:
        return ""
    # Checkpoints of before knew a model's configuration and weights alone.
    few = all(n == "config.json" or n.endswith(".safetensors") for n in old)
    names = old.keys() if few and field in _MODELS else old.keys() | new.keys()
    changed = sorted(n for n in names if old.get(n) != new.get(n))
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"its {', '.join(changed[:_SHOWN])}{more} is " if changed else None


def _sizes(old: Any, new: Any) -> str:
    sizes = [each.get("bytes") for each in (old, new) if each]
    if len(sizes) < 2 or None in sizes or sizes[0] == sizes[1]:
        return ""
    return f" (it had {old['bytes']} bytes and has {new['bytes']})"


def _value(manifest: dict[str, Any], name: str) -> Any:
    return next(group[name] for group in manifest["config"].values() if name in group)
