"""tools/parity.py: equal on a tiny model, different where the tolerance says so, clear mistakes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_phf.cli import parity
from tests.launch import run

COMMAND = ["python", "tools/parity.py", "--make-tiny-model"]


def test_parity_tool() -> None:
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    done = run([*COMMAND, *layout])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EQUAL: 4 rollouts, 2 process(es)" in done.stdout
    assert "flow_adjacent_per_pair[3]" in done.stdout
    assert "gradient model.layers.3.mlp.down_proj.weight" in done.stdout


def test_beyond_the_tolerance() -> None:
    done = run([*COMMAND, "--tolerance", "1e-12"])
    assert done.returncode == 1
    assert "DIFFERENT: 4 rollouts, 1 process(es)" in done.stdout
    assert "<-- beyond the tolerance" in done.stdout


def test_mistakes() -> None:
    done = run([*COMMAND, "--pipeline-model-parallel-size", "3"])
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "does not divide the model's 4 layers" in done.stderr
    done = run(["python", "tools/parity.py", "--hf-model", "/nowhere", "--replay-file", "/none"])
    assert done.returncode == 2
    assert "/nowhere: no such directory" in done.stderr


def test_the_norm_is_the_jobs_own() -> None:
    """Not one of the gradients, which would be right where the job clips by a wrong one."""
    metrics = dict.fromkeys((*parity._OUTPUT, *parity._OTHERS, "flow", "flow_geometry"), 1.0)
    metrics["flow_geometry_per_layer"] = [1.0]
    gradients = {"w": torch.tensor([3.0, 4.0])}
    product = {**metrics, "grad_norm": 5.1}, gradients
    expected = SimpleNamespace(metrics={**metrics, "grad_norm": 5.0}, gradients=gradients)
    *others, norm = parity.compare(product, expected)
    assert all(row[3] == 0 for row in others)
    assert norm == ("gradient norm", 5.1, 5.0, pytest.approx(0.02))
