"""The processes that a conversion starts: its ranks, and what verifies their work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_phf.files.foreign import read_json_object
from megatron_phf.runtime.environment import for_children, torchrun

_BF16_TOLERANCE = 0.25
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command of ours, its standard output ours.

    Raises:
        ValueError: it failed; the error it gave, else the end of what it said.
    """
    # Weights are converted in host memory, where the model's size matters least.
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        env=for_children({"OMP_NUM_THREADS": "1", **os.environ, **fixed, **environment}),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
        check=False,
    )
    if done.returncode:
        verdicts = ("error: ", "DIFFERENT: ")
        said = [line for line in done.stderr.splitlines() if line.startswith(verdicts)]
        text = said[0].removeprefix("error: ") if said else done.stderr[-3000:].strip()
        raise ValueError(text or f"{command[0]} failed with status {done.returncode}")


def start_ranks(job: dict[str, Any], directory: str) -> None:
    """Let the processes of a conversion do it; ``directory``: for the file that tells them what.

    Raises:
        ValueError: one failed; the error it gave.
    """
    path = os.path.join(directory, "job.json")
    Path(path).write_text(json.dumps(job))
    if job["action"] == "merge-adapter":
        merged = {name: value for name, value in job.items() if name != "probe"}
        Path(path).write_text(json.dumps(merged))
        return _run(["-m", "megatron_phf.cli.merge_adapter", path], {})
    count = job["tensor_model_parallel_size"] * job["pipeline_model_parallel_size"]
    module = ["-m", "megatron_phf.cli.convert", path]
    if count > 1:
        _run([*torchrun(count)[1:], *module], {})
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        _run(module, {**alone, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})


def _merged_in_bf16(job: dict[str, Any]) -> bool:
    if job["action"] != "merge-adapter" and not (job["action"] == "megatron-to-hf" and job["lora"]):
        return False
    return read_json_object(os.path.join(job["target"], "config.json"))["dtype"] == "bfloat16"


def verify(job: dict[str, Any], tolerance: float) -> None:
    """Compare the probe with what transformers computes from the HuggingFace side.

    Raises:
        ValueError: they differ beyond ``tolerance``, or one cannot be read.
    """
    check, action = ["-m", "megatron_phf.cli.check_export"], job["action"]
    # An export lies there in its own dtype already.
    to_megatron, merging = action == "hf-to-megatron", action == "merge-adapter"
    dtype = _TORCH_NAMES[job["dtype"]] if to_megatron else "float32"
    model = job["source"] if to_megatron else job["target"]
    try:
        if merging:  # peft computes with the adapter beside the weights
            _run([*check, job["adapter"], job["probe"], "--write", "--base", job["source"]], {})
        if _merged_in_bf16(job):  # merged weights are rounded, those beside an adapter not
            tolerance = max(tolerance, _BF16_TOLERANCE)
        command = [*check, model, job["probe"], "--tolerance", str(tolerance)]
        if action != "adapter-to-peft":
            copied = os.path.join(job["target"], *(("release", "hf") if to_megatron else ()))
            command += ["--tokenizers", job["source"] if merging else job["hf_model"], copied]
        _run([*command, "--rounded-to", dtype], {})
    except ValueError as error:
        raise ValueError(f"verification failed, nothing was kept: {error}") from error
