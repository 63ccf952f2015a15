"""The job scripts of examples/slurm on a real two-node cluster."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.test_evaluate import expected, make_files
from tests.slurm.cluster import Cluster

PRETRAIN = "examples/slurm/pretrain_phf.sbatch"


def test_evaluation_in_a_container_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """TP 2 within a node, DP 2 across: every draw as it must be, and logs of every rank."""
    job = cluster.submit(
        tmp_path / "job.out", "--nodes=2", "--gpus-per-node=2", "examples/slurm/evaluate.sbatch",
        *make_files(tmp_path), "--tensor-model-parallel-size", "2",
        OUTPUT_DIR=str(tmp_path / "out"), CONTAINER_COMMAND="tests/slurm/container.sh",
        SETUP="export OMP_NUM_THREADS=1; echo set up",
    )  # fmt: skip
    job.wait_until("COMPLETED")
    summary = json.loads((tmp_path / "out" / "sums" / "summary.json").read_text())
    assert summary["correct"] == expected()
    logs = tmp_path / "out" / "logs" / f"{job.id}-0"
    assert {f.name for f in logs.glob("container-on-*")} == {"container-on-n1", "container-on-n2"}
    assert job.text().count("set up") == 2
    for node in ("n1", "n2"):
        assert len(list(logs.glob(f"{node}/*/attempt_0/*/stdout.log"))) == 2


def test_pyxis_options(cluster: Cluster, tmp_path: Path) -> None:
    """This cluster's srun has no containers, and names the option that it was given."""
    job = cluster.submit(
        tmp_path / "job.out", "--gpus-per-node=1", PRETRAIN, "--hf-model", "x",
        OUTPUT_DIR=str(tmp_path), CONTAINER_IMAGE="nvcr/image.sqsh",
    )  # fmt: skip
    job.wait_until("FAILED", 30)
    assert "--container-image=nvcr/image.sqsh" in job.text()


def test_a_mistake_in_the_flags_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        tmp_path / "job.out", "--gpus-per-node=1", PRETRAIN, "--lr", "-1", OUTPUT_DIR=str(tmp_path)
    )
    job.wait_until("FAILED", 30)
    assert job.fields()["ExitCode"] == "2:0"
    assert "error: --lr -1.0: need at least 0\n" in job.text()
    assert "rendezvous" not in job.text()  # nothing was launched


def test_a_job_without_gpus_says_what_to_ask_for(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "job.out", PRETRAIN, OUTPUT_DIR=str(tmp_path))
    job.wait_until("FAILED", 30)
    assert "no GPUs in this job: ask with --gpus-per-node=N" in job.text()
