"""A study's batched engine and the training job, on the same rollouts."""

from __future__ import annotations

from benchmarks.harness import child


def test_a_studys_steps_are_the_jobs() -> None:
    """Output loss and gradient norm of every step, from a learning rate of 0 up."""
    found = child("benchmarks.study.replay", task="two", arm="phf_0.5", steps=4, lr=3e-3, warmup=2)
    assert found["steps"] == 4
    assert found["opsd"][0] > 1e-4
    assert found["opsd_difference"] < 1e-5
    assert found["grad_norm_difference"] < 1e-5
