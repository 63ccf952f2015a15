"""Convert between HuggingFace directories and Megatron checkpoints.

    python tools/convert_checkpoint.py hf-to-megatron path/to/Qwen3-1.7B runs/qwen3
    python tools/convert_checkpoint.py megatron-to-hf runs/train/checkpoints runs/exported
    python tools/convert_checkpoint.py adapter-to-peft runs/lora/checkpoints runs/adapter
    python tools/convert_checkpoint.py merge-adapter path/to/Qwen3-1.7B runs/adapter runs/merged

Starts TP x PP processes, on the CPU, which each hold their part of the model; afterwards another
process compares the logits of both sides (``--no-verify`` leaves that out).  The target is written
beside and renamed at the end: it is whole, or as it was.  docs/conversion.md has the details.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_phf.cli.conversion_steps import start_ranks, verify
from megatron_phf.cli.job_paths import JobPath, Role, check_paths
from megatron_phf.config.flags import check_fields
from megatron_phf.config.settings import Config
from megatron_phf.console import program
from megatron_phf.data.vocabulary import has_tokenizer
from megatron_phf.files.replace import (
    PARTIAL,
    mark,
    not_ours,
    remove,
    replace_directory,
    set_aside,
)
from megatron_phf.model.architecture import check_split, read_architecture
from megatron_phf.train.checkpoint_files import (
    MANIFEST,
    TRACKER,
    check_sizes,
    read_manifest,
)
from megatron_phf.weights.adapters import check_adapter
from megatron_phf.weights.headers import check_hf_weights

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_DTYPES = {"F32": "fp32", "BF16": "bf16"}
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")


def parse_size(text: str) -> int:
    """Bytes of a size like 5GB or 200MB.

    Raises:
        ValueError: another form.
    """
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.isdigit() or int(number) == 0:
        raise ValueError(f"--max-shard-size {text}: write it as 5GB, 200MB or 100KB")
    return int(number) * _UNITS[unit]


def checkpoint_directory(path: str) -> str:
    """The newest checkpoint of the directory of a run, or ``path`` itself if it is one.

    Raises:
        ValueError: there is none.
    """
    tracker = os.path.join(path, TRACKER)
    if os.path.isfile(tracker):
        name = Path(tracker).read_text().strip()
        name = f"iter_{int(name):07d}" if name.isdigit() else name
        path = os.path.join(path, name)
    if not os.path.isfile(os.path.join(path, ".metadata")):
        raise ValueError(f"{path}: no Megatron checkpoint (neither {TRACKER} nor .metadata)")
    return path


def _kept_dtype(directory: str, found: set[str]) -> str:
    if found == {"F16"} or len(found) > 1:
        kinds = ", ".join(sorted(found))
        raise ValueError(f"{directory}: its weights are {kinds}; choose --dtype fp32 or bf16")
    return _DTYPES[found.pop()]


def _check_target(args: argparse.Namespace) -> None:
    """Raise ValueError where the target is there, meets a source, or cannot be written."""
    if os.path.lexists(args.target) and not args.overwrite:
        raise ValueError(f"{args.target}: is there already; pass --overwrite to replace it")
    from_hf = args.action in ("hf-to-megatron", "merge-adapter")
    paths = [JobPath("SOURCE", args.source, Role.MODEL if from_hf else Role.CHECKPOINTS)]
    more = {
        "ADAPTER": getattr(args, "adapter", None),
        "--hf-model": getattr(args, "hf_model", None),
    }
    paths += [JobPath(name, path, Role.MODEL) for name, path in more.items() if path is not None]
    check_paths([*paths, JobPath("TARGET", args.target, Role.WHOLE)], Config())


def _check_tokenizer(directory: str, name: str) -> None:
    """Raise ValueError where half a tokenizer would be copied; say where there is none."""
    if not has_tokenizer(directory, name, required=False):
        print(f"warning: {name} {directory} has no tokenizer, and the target will have none")


def plan_job(args: argparse.Namespace) -> dict[str, Any]:
    """The job for ``megatron_phf.cli.convert``, every check without torch done.

    Raises:
        ValueError: source, target or sizes do not fit; names the remedy.
    """
    _check_target(args)
    job = {
        "action": args.action,
        "source": os.path.abspath(args.source),
        "target": os.path.realpath(args.target) + PARTIAL,
        "dtype": None if args.dtype == "keep" else args.dtype,
        "max_shard_bytes": parse_size(args.max_shard_size),
    }
    if args.action in ("hf-to-megatron", "merge-adapter"):
        arch = read_architecture(job["source"])
        tensors = check_hf_weights(job["source"], arch)
        job["dtype"] = job["dtype"] or _kept_dtype(args.source, {t.dtype for t in tensors.values()})
        _check_tokenizer(job["source"], "SOURCE")
    if args.action == "merge-adapter":
        check_adapter(args.adapter, arch)
        return {**job, "adapter": os.path.abspath(args.adapter)}
    if args.action == "hf-to-megatron":
        job["hf_model"] = job["source"]
    else:
        job |= _checkpoint(args)
        arch = read_architecture(job["hf_model"])
        if args.action == "megatron-to-hf":
            _check_tokenizer(job["hf_model"], "--hf-model")
    job["tensor_model_parallel_size"] = args.tensor_model_parallel_size
    job["pipeline_model_parallel_size"] = args.pipeline_model_parallel_size
    _check_layout(job, arch)
    return job


def _checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """What the job takes from a Megatron checkpoint: its place, model and LoRA flags."""
    source = os.path.abspath(checkpoint_directory(args.source))
    config = _check_manifest(source)
    lora = config.get("lora") or {}
    lora = {name: lora[name] for name in _LORA if name in lora} if lora.get("lora_rank") else None
    hf_model = os.path.abspath(args.hf_model or os.path.join(source, "hf"))
    if args.action == "adapter-to-peft":
        if lora is None:
            raise ValueError(f"{source}: was not trained with --lora-rank; it has no adapters")
        hf_model = args.hf_model or str((config.get("model") or {}).get("hf_model"))
        hf_model = os.path.abspath(hf_model)
        if not os.path.isdir(hf_model):
            raise ValueError(f"{hf_model}: the adapter's base is not there; pass --hf-model")
    elif args.hf_model is None and not os.path.isdir(hf_model):
        raise ValueError(f"{source}: has no hf directory with config.json; pass --hf-model")
    return {"source": source, "hf_model": hf_model, "lora": lora}


def _check_manifest(source: str) -> dict[str, Any]:
    """The configuration in ``checkpoint.json``, if there is one; the sizes of all files checked."""
    if not os.path.isfile(os.path.join(source, MANIFEST)):
        return {}
    manifest = read_manifest(source)
    check_sizes(source, manifest)
    return manifest.get("config") or {}


def _check_layout(job: dict[str, Any], arch: Any) -> None:
    sizes = {name: job[name] for name in job if name.endswith("_parallel_size")}
    more: dict[str, Any] = {"max_prompt_length": 1, "max_teacher_prompt_length": 1}
    more |= {"sequence_parallel": True, "pad_attention_heads": True}
    config = Config().replaced(**sizes, **more)
    check_fields(config)
    check_split(arch, config)


def convert(args: argparse.Namespace) -> None:
    """Plan, convert, verify, rename.

    Raises:
        ValueError: anything went wrong; the target is as it was.
    """
    job = plan_job(args)
    partial, target = job["target"], job["target"].removesuffix(PARTIAL)
    remove(partial)
    try:
        with tempfile.TemporaryDirectory() as directory:
            job["probe"] = os.path.join(directory, "probe.safetensors") if args.verify else None
            os.makedirs(os.path.dirname(partial), exist_ok=True)
            start_ranks(job, directory)
            if args.verify:
                verify(job, args.tolerance)
        mark(partial)
        if not_ours(target) is not None:  # --overwrite, but not a word of throwing it away
            print(f"what was in {target} is in {set_aside([target])[0]} now")
        replace_directory(partial, target)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error})") from error
    finally:
        for path in (partial, partial + PARTIAL):
            remove(path)


def _add_flags(name: str, action: argparse.ArgumentParser) -> None:
    action.set_defaults(dtype="keep", max_shard_size="5GB")
    if name != "adapter-to-peft":
        action.add_argument("--dtype", choices=("keep", "fp32", "bf16"), help="of the target")
    if name in ("megatron-to-hf", "merge-adapter"):
        action.add_argument("--max-shard-size", help="of a file of the target (default: 5GB)")
    if name in ("megatron-to-hf", "adapter-to-peft"):
        action.add_argument(
            "--hf-model", help="its HuggingFace directory, if not what the checkpoint says"
        )
    if name != "merge-adapter":
        action.add_argument("--tensor-model-parallel-size", type=int, default=1)
        action.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    action.add_argument("--overwrite", action="store_true", help="replace an existing target")
    action.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    action.add_argument("--tolerance", type=float, default=1e-3, help="of verified logits")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    megatron = "Megatron checkpoint, or a run's directory"
    for name, source, target in (
        ("hf-to-megatron", "HuggingFace directory", "Megatron checkpoint, for --load"),
        ("megatron-to-hf", megatron, "HuggingFace directory"),
        ("adapter-to-peft", megatron, "PEFT directory"),
        ("merge-adapter", "HuggingFace directory", "HuggingFace directory"),
    ):
        action = actions.add_parser(name, allow_abbrev=False)
        action.add_argument("source", help=source)
        if name == "merge-adapter":
            action.add_argument("adapter", help="PEFT directory")
        action.add_argument("target", help=target)
        _add_flags(name, action)
    return parser


@program
def main(argv: list[str] | None = None) -> int:
    """Convert; 2 and one error line where that is impossible."""
    args = build_parser().parse_args(argv)
    convert(args)
    print(f"written to {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
