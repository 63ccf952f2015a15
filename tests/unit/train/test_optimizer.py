"""What surrounds megatron-core's optimizers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_phf.train.optimizer import StudentOptimizer


class Chunk:
    """Counts its gathers."""

    def __init__(self) -> None:
        self.gathers = 0

    def start_param_sync(self) -> None:
        self.gathers += 1


@pytest.mark.parametrize(
    ("optimizers", "distributed", "overlap", "gathers"),
    [
        (2, True, False, 1),  # megatron-core: one each
        (1, True, False, 1),
        (2, True, True, 2),  # left to what overlaps them
        (2, False, False, 0),
    ],
)
def test_weights_are_gathered_once(
    optimizers: int, distributed: bool, overlap: bool, gathers: int
) -> None:
    chunk = Chunk()
    own = SimpleNamespace(
        optimizer=SimpleNamespace(chained_optimizers=[None] * optimizers),
        wrapped=[chunk],
        _overlap_gather=overlap,
        _distributed=distributed,
    )
    with StudentOptimizer._one_gather(own):
        for _ in range(optimizers if distributed else 0):
            chunk.start_param_sync()
    assert chunk.gathers == gathers
    assert "start_param_sync" not in vars(chunk)
