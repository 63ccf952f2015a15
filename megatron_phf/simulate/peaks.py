"""The memory of layouts by simulation, for the planner.  No import of torch before it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_phf.config.settings import Config
from megatron_phf.simulate import ranks
from megatron_phf.simulate.job import Job
from megatron_phf.teacher.architecture import Models

_GIB = 2**30


def simulated_peaks(
    models: Models, configs: Sequence[Config], world: int
) -> list[dict[str, float]]:
    """GiB of each holder at the peak of the fuller of the first and the last rank.

    Raises:
        ValueError: the simulation cannot run here, or a layout fails in it; says why.
    """
    sim = ranks.prepare()
    found = []
    for config in configs:
        played = ranks.run_ranks(sim, Job(config, models, world), sorted({0, world - 1}))
        for result in played:
            for phase, what, site, _ in result["refused"]:
                raise ValueError(f"rank {result['rank']}, {phase}: {what} ({site})")
        phases = [m for result in played for m in result["memory"].values()]
        fullest = max(phases, key=lambda m: m["bytes"])
        found.append({name: size / _GIB for name, size in fullest["held"].items() if size})
    return found
