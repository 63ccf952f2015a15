"""The end of a training job: the trained student on the disk, at its place or at another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.files.replace import free_number
from megatron_phf.lora.files import save_peft_adapter
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.rollout.megatron.engine import MegatronRollouts
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.hooks import RunHook
from megatron_phf.train.logging import say
from megatron_phf.weights.huggingface import save_hf

# Write to (directory, flag that named it); ValueError on every rank where that is impossible.
Save = Callable[[str, str], None]


def _elsewhere(flag: str, output_dir: str) -> list[str]:
    """Directories, not there yet, to save to where the one of ``flag`` cannot be written."""
    name = flag.removeprefix("--") + ".rescued"
    paths = [os.path.join(os.path.realpath(where), name) for where in (output_dir, _scratch())]
    return [f"{path}.{free_number([path])}" for path in paths]


def _scratch() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # none can be written
        return os.getcwd()


def save_or_rescue(save: Save, flag: str, target: str, output_dir: str) -> str | None:
    """Save to ``target``, or else under ``output_dir`` or in the temporary directory; collective.

    Returns:
        None, or why it is not at its place, and where it is.
    """
    try:
        save(target, flag)
        return None
    except ValueError as error:
        problem = str(error)
    for path in on_first_rank(_elsewhere, flag, output_dir):
        try:
            save(path, "instead of it")
        except ValueError as error:
            problem += f"; {error}"
        else:
            return f"{problem}; the trained weights are in {path} instead: move them"
    return f"{problem}; the trained weights are lost, but for the checkpoints of --save"


def export_probe(
    student: list[FlowGPTModel], arch: Architecture, rows: int, length: int
) -> dict[str, Tensor]:
    """Tokens, and the student's logits for them, for ``tools/check_export.py``; collective."""
    shape, generator = (rows, length), torch.Generator().manual_seed(0)
    tokens = torch.randint(arch.vocab_size, shape, generator=generator)
    logits = MegatronRollouts(student, arch.vocab_size, rows).next_token_logits(tokens)
    return {"tokens": tokens, "logits": logits.float().cpu()}


def _write_probe(student: list[FlowGPTModel], arch: Architecture, path: str) -> None:
    tensors = export_probe(student, arch, 4, 32)
    if not parallel.is_first_rank():
        return
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        say(f"warning: {path} cannot be written ({error}); the exports are whole without it")


class Export(RunHook):
    """The student at the end of a run, and what it computes, for ``tools/check_export.py``."""

    def __init__(self, config: Config, arch: Architecture, student: list[FlowGPTModel]) -> None:
        self._config, self._arch, self._student = config, arch, student

    def at_end(self, iteration: int, stopped: bool) -> str | None:
        """Save; why an export is not at its place, and where it is."""
        if stopped:
            return None
        output = self._config.output.output_dir
        named = {
            "--save-adapter": (self._config.lora.save_adapter, self._save_adapter),
            "--save-hf": (self._config.output.save_hf, self._save_model),
        }
        problems = {
            target: save_or_rescue(save, flag, target, output)
            for flag, (target, save) in named.items()
            if target is not None
        }
        if not problems:
            return None
        probe = os.path.join(output, "export_probe.safetensors")
        _write_probe(self._student, self._arch, probe)
        for target, problem in problems.items():
            if problem is None:
                check = f"python tools/check_export.py {target} {probe}"
                say(f"exported to {target}; compare its logits: {check}")
        return "; ".join(filter(None, problems.values())) or None

    def _save_adapter(self, target: str, flag: str) -> None:
        save_peft_adapter(self._student, self._config, target, flag)

    def _save_model(self, target: str, flag: str) -> None:
        source = self._config.model.hf_model
        assert source is not None
        save_hf(self._student, self._arch, self._config, source, target, flag=flag)
