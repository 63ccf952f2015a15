"""Several teachers: who reads which of a step's rollouts, and the step's numbers by teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_phf.data.rollouts import Rollout
from megatron_phf.runtime import device, parallel
from megatron_phf.train.metrics import OutputLoss


def numbers_by_teacher(rollouts: Sequence[Rollout], names: Sequence[str]) -> list[list[int]]:
    """The numbers of the rollouts that each teacher reads, in its order; a list for all without.

    Teachers that read nothing have no list.
    """
    first = names[0] if names else None
    found = [
        [i for i, rollout in enumerate(rollouts) if (rollout.teacher or first) == name]
        for name in names
    ]
    return [numbers for numbers in found if numbers] if names else [[*range(len(rollouts))]]


def metrics_by_teacher(
    outputs: Sequence[OutputLoss], teachers: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Means over the tokens of each teacher in the global batch, and their number.

    None of a teacher that has read none.  Every rank calls it, the last stage with the ``outputs``
    of its microbatches and the ``teachers`` of these.
    """
    if not names:
        return {}
    sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device.device())
    if parallel.tensor_parallel_rank() == 0:  # the others hold the same values
        for output, teacher in zip(outputs, teachers, strict=bool(outputs)):
            seen = (output.per_token, output.teacher_entropy, output.agreement)
            terms = torch.stack((*seen, torch.ones_like(output.agreement)))
            sums[names.index(teacher)] += terms.double().sum(-1)
    dist.all_reduce(sums)
    *means, count = sums.T.tolist()
    found: dict[str, Any] = {}
    for key, values in zip(("opsd", "teacher_entropy", "teacher_agreement"), means, strict=True):
        of_each = (x / n if n else math.nan for x, n in zip(values, count, strict=True))
        found[f"{key}_by_teacher"] = {
            name: None if math.isnan(mean) else mean
            for name, mean in zip(names, of_each, strict=True)
        }
    found["rollout_tokens_by_teacher"] = dict(zip(names, map(round, count), strict=True))
    return found
