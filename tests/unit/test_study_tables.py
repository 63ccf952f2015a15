"""What a study's tables say of runs whose numbers are known."""

from __future__ import annotations

import pytest

from benchmarks.study import tables
from benchmarks.study.studies import STUDIES
from benchmarks.study.train import Run

HOT, COLD = Run(0, 0, 2e-3), Run(0, 0, 5e-4)


def test_the_best_is_chosen_by_the_other_seed() -> None:
    """HOT wins on seed 0, COLD on seed 1: each seed's runs are scored where the other one won."""
    cells = {
        HOT: {(0, 0): {100: 0.9}, (0, 1): {100: 0.2}},
        COLD: {(0, 0): {100: 0.5}, (0, 1): {100: 0.6}},
    }
    assert tables.best(cells, tables.at(100)) == {(0, 0): 0.5, (0, 1): 0.2}


def test_intervals_hold_for_all_comparisons() -> None:
    """By hand: mean 2 points, standard error 0.577, t of 2 degrees 4.303, for two of them 6.205."""
    one, two = (tables.interval([0.01, 0.02, 0.03], n) for n in (1, 2))
    assert (one.mean, one.half) == pytest.approx((2.0, 4.3027 * 0.57735), abs=1e-3)
    assert two.half == pytest.approx(6.2053 * 0.57735, abs=1e-3)
    assert str(one) == "+2.0 [-0.5, +4.5]"


def test_a_level_is_reached_behind_the_first_look_that_has_it() -> None:
    looks = {0: 0.3, 25: 0.6, 50: 0.7, 75: 0.65}
    assert tables.first_look(looks, 0.7) == 50
    assert tables.first_look(looks, 0.8) == float("inf")
    assert tables.over_all(looks) == pytest.approx(0.65)


def test_names_tell_rates_apart_where_there_are_several() -> None:
    rates, stale = STUDIES["rates"], STUDIES["stale"]
    assert rates.name_of(rates.arms[0], HOT) == "opsd lr 0.002 warm-up 0"
    assert stale.name_of(stale.arms[0], stale.runs[0]) == "beta_0_stale_0"
