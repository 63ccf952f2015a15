"""Write cases for the driver, launch it, and compare what it saved with a reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_phf.reference import flags as flags
from tests.launch import torchrun

METRICS = (
    "loss", "opsd", "clipped_fraction", "teacher_entropy", "student_entropy", "rollout_tokens",
)  # fmt: skip


def keys(metrics: dict) -> list[str]:
    """What the reference computes: METRICS, all of the run's flow terms, importance weights."""
    return [*METRICS, *(key for key in metrics if key.startswith(("flow", "importance")))]


def launch(
    processes: int,
    cases: list[dict],
    directory: Path,
    timeout: float = 600,
    driver: str = "tests/parallel/driver.py",
) -> None:
    """Run ``cases`` on ``processes`` ranks; each leaves NAME.json and NAME.safetensors."""
    path = directory / f"cases{processes}.json"
    path.write_text(json.dumps(cases))
    done = torchrun(processes, driver, str(path), str(directory), timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def selected(request: pytest.FixtureRequest, cases: dict) -> dict:
    """The cases that this module's selected tests (pytest's -k) name."""
    here = [i for i in request.session.items if i.fspath == request.node.fspath]
    names = {i.callspec.params["name"] for i in here if hasattr(i, "callspec")}
    return {name: case for name, case in cases.items() if name in names}


def metrics_deviation(found: dict, expected: dict) -> float:
    """Largest relative deviation of all values the reference computes."""
    deviations = [0.0]
    for key in keys(expected):
        if expected[key] is None:
            assert found[key] is None, key
            continue
        listed = isinstance(expected[key], list)
        ours, wanted = (x[key] if listed else [x[key]] for x in (found, expected))
        assert len(ours) == len(wanted), key
        deviations += [abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, wanted, strict=True)]
    return max(deviations)


def tensor_deviation(found: dict, expected: dict) -> float:
    """Largest distance of a tensor from the expected one, relative to that one's norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - wanted).norm() / wanted.norm().clamp(min=1e-6))
        for name, wanted in expected.items()
    )


def compare_metrics(found: dict, expected: dict, tolerance: float) -> None:
    """Every value the reference computes, lists entry by entry."""
    for key in keys(expected):
        wanted = expected[key]
        if wanted is not None:
            wanted = pytest.approx(wanted, rel=tolerance, abs=tolerance / 100)
        assert found[key] == wanted, key
    aux = expected.get("moe_aux_loss")
    assert found.get("moe_aux_loss") == (None if aux is None else pytest.approx(aux, rel=tolerance))


def compare_tensors(found: dict, expected: dict, tolerance: float) -> None:
    """Each tensor within ``tolerance`` of its norm."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (found[name] - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error < tolerance, (name, float(error))
