"""One cluster for all SLURM tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes; gone afterwards."""
    running = Cluster()
    yield running
    running.stop()
