"""Small layouts on fake CUDA: nothing is refused, waited for, beyond the formula or unmatched.

And errors that no test on CPUs can see turn each of these checks red.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from megatron_phf.simulate import match, report
from tests.launch import REPO
from tests.simulate.cases import LAYOUTS, PLANTED

# Where a step's host may wait for the device, how often, and why.
WAITS = {
    ("runtime/device.py", "torch.cuda.synchronize"): 3,  # ends of phases, for their seconds
    ("train/student_pass.py", "tolist"): 1,  # the tokens of the global batch
    ("runtime/parallel.py", "tolist"): 1,  # whether all is finite, on any rank
    ("train/optimizer.py", "item"): 1,  # the gradient's norm, which megatron-core clips by
    ("train/metrics.py", "to the host"): 1,  # what is logged, all at once
}
# Of single layouts, beside those.
MORE = {
    # megatron-core's own, once a layer, pass and microbatch: how many tokens go to which expert.
    # The last of a layer's three waits is for the sizes of what goes to other ranks.
    "experts": {
        ("model/layer.py", "masked_select"): 16,
        ("model/layer.py", "wait for a stream or an event"): 8,
        ("model/moe.py", "item"): 1,
    },
    # An average in host memory takes the weights there.
    "offload": {("teacher/average.py", "wait for a stream or an event"): 1},
    "two teachers": {("train/by_teacher.py", "tolist"): 1},  # its numbers by teacher
    # A batch is begun, and three tokens are decoded.
    "decode": {
        ("runtime/device.py", "wait for a stream or an event"): 3,
        ("rollout/megatron/batch.py", "to the device"): 6,
        ("rollout/megatron/batch.py", "tolist"): 2,
        ("rollout/megatron/cache.py", "to the device"): 1,
        ("rollout/megatron/cache.py", "item"): 1,
    },
}
MOST = 10  # waits in a step of dense layers, whatever the layers and microbatches


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases by name; both processes one after the other, on one core."""
    found: dict[str, Any] = {}
    for kind in ("plain", "stub"):
        output = tmp_path_factory.mktemp("simulate") / f"{kind}.json"
        command = [sys.executable, "-m", "tests.simulate.driver", str(output), kind]
        done = subprocess.run(
            command, cwd=REPO, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found |= json.loads(output.read_text())
    return found


def waits(result: dict) -> Counter[tuple[str, str]]:
    """By (file of the product, kind)."""
    found: Counter[tuple[str, str]] = Counter()
    for _, kind, site, number in result["syncs"]:
        found[site.split(":")[0], kind] += number
    return found


def too_many(result: dict, allowed: dict[tuple[str, str], int]) -> dict:
    """Waits that are not in the list, or more often."""
    return {where: n for where, n in waits(result).items() if n > allowed.get(where, 0)}


def deviation(result: dict) -> float:
    """Of the formula's peak from the simulated one."""
    return report.formula(result) / report.peak(result) - 1


def mismatches(results: list[dict]) -> list[str]:
    return match.mismatches({r["rank"]: r["log"] for r in results})


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, played: dict[str, list[dict]]) -> None:
    layout, results = LAYOUTS[name], played[name]
    allowed = WAITS | MORE.get(name, {})
    assert [r["rank"] for r in results] == list(layout.ranks)
    for r in results:
        assert r["refused"] == [], r.get("traceback")
        assert too_many(r, allowed) == {}
        if name not in MORE:
            assert report.synchronisations(r) <= MOST
        assert deviation(r) == pytest.approx(0, abs=0.05), report.describe(r, layout.world)
    assert mismatches(results) == []


def test_what_is_reported(played: dict[str, list[dict]]) -> None:
    """By hand: the parts of a rank of two, all weights trained, fp32 gradients sharded by none."""
    first = played["tensor"][0]
    heads, vocabulary = 16 * 128 // 2, 32000 // 2
    layer = 1024 * (2 * heads + 2 * heads // 4) + 3 * 1024 * 1536 + 2 * 1024 + 2 * 128
    n = 4 * layer + 2 * vocabulary * 1024 + 1024
    held = first["memory"]["optimizer"]["held"]
    assert held["weights"] == pytest.approx(2 * n, rel=1e-3)
    assert held["teacher"] == pytest.approx(2 * n, rel=1e-3)
    assert held["gradients"] == pytest.approx(4 * n, rel=1e-3)
    # Masters and two moments, and for a moment a root of the second.
    assert held["optimizer"] == pytest.approx(16 * n, rel=1e-3)
    assert first["place"]["TP"] == [0, 2]
    # What a tensor-parallel layer gathers and scatters: [s, b, h] in bf16, s padded to 512.
    tensor = [row for row in first["communication"] if row[2] == "TENSOR_MODEL_PARALLEL_GROUP"]
    assert {row[6] / row[5] for row in tensor if row[1] == "reduce_scatter_base"} == {
        512 * 1024 * 2, 576 * 1024 * 2
    }  # fmt: skip
    text = report.describe(first, 2)
    assert text.startswith("rank 0 of 2  TP 0/2")
    assert "host-device synchronisations a step: 7" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("host weights", "on the host"),
        ("narrow rows", "reduction dim"),
        ("wide dtype", "dtype"),
        ("no update", "the optimizer ran in 0 of 1 steps"),
    ],
)
def test_a_planted_error_is_refused(name: str, text: str, played: dict[str, list[dict]]) -> None:
    (result,) = played[name]
    assert any(text in what for _, what, _, _ in result["refused"]), result["refused"]
    phases = {phase for phase, *_ in result["refused"]}
    assert phases <= {"student", "optimizer"}
    assert all(site != "?" for _, _, site, _ in result["refused"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("swapped", "these ranks wait for each other: rank 0 waits in allreduce of "),
        ("another shape", "rank 0 is in allreduce of default_pg, float32 [3], at "),
        ("left out", ", operation "),
    ],
)
def test_a_planted_hang_is_named(name: str, text: str, played: dict[str, list[dict]]) -> None:
    results = played[name]
    assert all(r["refused"] == [] for r in results)
    found = mismatches(results)
    assert len(found) == 1 and text in found[0], found
    assert found[0].count("train/step.py:") + found[0].count("train/metrics.py:") == 2


def test_a_tensor_that_is_kept_leaves_the_formula(played: dict[str, list[dict]]) -> None:
    (result,) = played["kept"]
    assert result["refused"] == [] and deviation(result) < -0.05


def test_a_number_that_a_layer_asks_for_is_counted(played: dict[str, list[dict]]) -> None:
    (result,) = played["asks"]
    assert set(too_many(result, WAITS)) == {("model/layer.py", "item")}
    # Two layers, both models, one microbatch.
    assert waits(result)["model/layer.py", "item"] == 4
    assert set(played) == {*LAYOUTS, *PLANTED, "commands"}


def test_the_commands(played: dict[str, Any]) -> None:
    """The planner's first layout has the simulation's memory; a rank too large is an error."""
    status, text = played["commands"]["plan"]
    assert status == 0
    assert text.count(" GiB by simulation (") == 1 and text.count(" GiB by formula (") == 1
    assert text.index("by simulation") < text.index("by formula")
    status, text = played["commands"]["dry_run"]
    assert status == 1
    assert text.startswith("rank 1 of 2  DP 1/2")
    assert "\nerror: rank 1: " in text and " GB at its peak, a GPU has 1\n" in text
