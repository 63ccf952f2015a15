"""Training and rollout nodes in one job: vLLM's endpoints on the second, ranks on the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_vllm import servers_of, write_program
from tests.slurm.cluster import Cluster
from tests.slurm.test_lives import PRETRAIN, make_inputs, named

ITERS = 6  # a second each: rollouts are always under way
TWO = ("--nodes=2", "--gpus-per-node=2", PRETRAIN)


def test_one_node_serves_while_the_other_trains(cluster: Cluster, tmp_path: Path) -> None:
    """Weights over torch.distributed each step, in two lives; the server ends with the job.

    USR1, as before a time limit: the ranks save what the server, which does not heed it, samples.
    """
    make_inputs(tmp_path)
    write_program(tmp_path / "vllm")
    out = tmp_path / "out"
    job = cluster.submit(
        tmp_path / "job.out", *TWO, *named(tmp_path), "--tensor-model-parallel-size", "2",
        "--global-batch-size", "4", "--max-new-tokens", "8", "--lr", "1e-2", "--dtype", "fp32",
        "--no-tensorboard", "--max-off-policy-steps", "1", OUTPUT_DIR=str(out), SAVE_INTERVAL="1",
        TRAIN_ITERS=str(ITERS), ROLLOUT_NODES="1", VLLM=str(tmp_path / "vllm"),
        VLLM_FLAGS="--delay 1 1", SETUP="hostname",
    )  # fmt: skip
    saved = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    job.wait_for(saved.exists, "a checkpoint")
    cluster.client("scancel", "--signal=USR1", job.id)
    job.wait_until("COMPLETED")
    assert "SIGUSR1 received: ending after step" in job.text()
    assert job.text().count("requeueing") == 1 == int(job.fields()["Restarts"])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # By the server's word: of the step before.  What was not saved would be sampled anew, later.
    assert [step["rollout_staleness"]["max"] for step in steps] == [0] + [1] * (ITERS - 1)
    assert steps[0]["rollout_drift"] < 1e-5 < steps[3]["rollout_drift"]
    assert "1 node(s) x 2 rank(s), rendezvous localhost:" in job.text() and "finished" in job.text()
    for life in (0, 1):
        (log,) = (out / "logs" / f"{job.id}-{life}").glob("vllm-*.log")
        assert log.name == "vllm-n2.log" and log.read_text().startswith("n2\n")
    assert not servers_of(tmp_path / "hf")


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"ROLLOUT_NODES": "2"}, [], "error: ROLLOUT_NODES=2 of 2 node(s) leaves none to train\n"),
        (
            {"ROLLOUT_NODES": "1"},
            ["--vllm-weight-sync=checkpoint"],
            "error: ROLLOUT_NODES: --vllm-weight-sync checkpoint: need torch_distributed, nccl",
        ),
        (
            {"ROLLOUT_NODES": "1", "VLLM": "echo no GPU:", "MAX_RESTARTS": "0"},
            [],
            "no GPU: serve {inputs}/hf --port",
        ),
    ],
)
def test_servers_that_cannot_be(
    cluster: Cluster, tmp_path: Path, variables: dict, flags: list[str], message: str
) -> None:
    """One message, and nobody trains."""
    make_inputs(tmp_path)
    job = cluster.submit(
        tmp_path / "job.out", *TWO, *named(tmp_path), *flags, OUTPUT_DIR=str(tmp_path), **variables
    )
    job.wait_until("FAILED", 60)
    assert message.format(inputs=tmp_path) in job.text()
    assert "rendezvous" not in job.text()
