"""The driver over the stand-in for Transformer Engine: arguments and cases are the driver's.

NAME.record.json: what each module of the stand-in, and each loss, met of FP8, on rank 0.  A case
with "adam": "torch" runs as where Transformer Engine is not installed, with torch's Adam.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fake_te")]

from megatron_phf.runtime import environment  # noqa: E402

environment.set_cuda_defaults(os.environ)  # as the product does

import torch  # noqa: E402
import transformer_engine as te  # noqa: E402

from megatron_phf.runtime import device  # noqa: E402

device.import_megatron()

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402

from megatron_phf.hidden.tap import FlowTap  # noqa: E402
from megatron_phf.train import student_pass  # noqa: E402
from tests.parallel import driver  # noqa: E402


def noted(what: str, function):
    """``function``, each call of which is recorded."""

    def call(*args, **kwargs):
        on = te.pytorch.fp8.FP8GlobalStateManager.is_fp8_enabled()
        te.record.append({"what": what, "fp8": on, "dtype": str(args[0].dtype)})
        return function(*args, **kwargs)

    return call


def visit(self, layer: int, microbatch: int, inputs, output):
    """FlowTap.visit, each call of which is recorded."""
    on = te.pytorch.fp8.FP8GlobalStateManager.is_fp8_enabled()
    te.record.append({"what": "flow", "fp8": on, "dtype": str(output.dtype)})
    return original_visit(self, layer, microbatch, inputs, output)


def torchs_adam() -> contextlib.ExitStack:
    """megatron-core chooses its Adam when it is imported: as if there had been no fused one."""
    stack = contextlib.ExitStack()
    for module, name, value in (
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
        (distrib_optimizer, "USING_TE_OPTIMIZER", False),
    ):
        stack.enter_context(mock.patch.object(module, name, value))
    return stack


def run_case(config, case: dict, path: str) -> object:
    """As the driver's, with a record."""
    te.record.clear()
    te.pytorch.module.base.destroy_ub()  # one case a process would not need it
    with torchs_adam() if case.get("adam") == "torch" else contextlib.nullcontext():
        result = original_run(config, case, path)
    if torch.distributed.get_rank() == 0:
        Path(path.replace(".safetensors", ".record.json")).write_text(json.dumps(te.record))
    return result


original_visit, original_run = FlowTap.visit, driver.run_case
FlowTap.visit, driver.run_case = visit, run_case
student_pass.chunked_divergence = noted("output loss", student_pass.chunked_divergence)

if __name__ == "__main__":
    driver.main()
