"""What is compared with what: arms, and the runs that each of them has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.study.train import Arm, Run

BASES, SEEDS = 4, 2
_TERMS = {
    "opsd": (0.0, ("direction", "geometry", "adjacent")),
    "phf": (0.5, ("direction", "geometry", "adjacent")),
    "pointwise": (0.5, ("pointwise",)),
    "mse": (0.5, ("mse",)),
    "nmse": (0.5, ("nmse",)),
    "cka": (0.5, ("cka",)),
    "last_layer": (0.5, ("last_layer",)),
}


def _arm(term: str, **changes: object) -> Arm:
    alpha, terms = _TERMS[term]
    return Arm(**{"name": term, "alpha": alpha, "terms": terms, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Study:
    """``arms``, each with every one of ``runs``; ``looks``: the steps behind which to evaluate."""

    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    steps: int = 100
    looks: tuple[int, ...] = (0, 25, 50, 75, 100)

    def name_of(self, arm: Arm, run: Run) -> str:
        """Of all runs that differ by base model and seed alone."""
        if len({(each.lr, each.warmup) for each in self.runs}) == 1:
            return arm.name
        return f"{arm.name} lr {run.lr:g} warm-up {run.warmup}"


def _runs(rates: tuple[float, ...], warmups: tuple[int, ...]) -> Iterator[Run]:
    for lr, warmup in itertools.product(rates, warmups):
        for base, seed in itertools.product(range(BASES), range(SEEDS)):
            yield Run(base, seed, lr, warmup)


_ONE_RATE = tuple(_runs((5e-4,), (20,)))
STUDIES = {
    # Where does a hidden-state loss help?  Every learning rate, with and without warm-up.
    "rates": Study(
        (
            _arm("opsd"),
            _arm("phf", name="phf_0.5"),
            _arm("phf", name="phf_0.05", alpha=0.05),
            _arm("nmse"),
            _arm("cka"),
        ),
        tuple(_runs((2.5e-4, 5e-4, 1e-3, 2e-3), (0, 20))),
    ),
    # Terms, and what the teacher is shown.
    "controls": Study(
        tuple(
            _arm(name, name=f"{name}_{kind}", privileged=kind)
            for kind in ("solution", "answer", "other_problem", "wrong")
            for name in _TERMS
        ),
        _ONE_RATE,
    ),
    # How old may rollouts be?
    "stale": Study(
        tuple(
            _arm("opsd", name=f"beta_{beta:g}_stale_{stale}", beta=beta, stale=stale)
            for beta in (0.0, 0.5, 1.0)
            for stale in (0, 1, 2, 4)
        ),
        _ONE_RATE,
    ),
}
