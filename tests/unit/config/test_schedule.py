"""The learning rate at every step, against formulas written out here, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_phf.config.flags import check_fields, parse_args
from megatron_phf.config.schedule import check_schedule, decay_iters
from megatron_phf.config.settings import Config
from megatron_phf.runtime import device

device.import_megatron()

from megatron_phf.train.optimizer import _schedule  # noqa: E402

BATCH, PEAK, LOW = 32, 3e-4, 1e-5


def rates(steps: int, **settings: object) -> list[float]:
    """What the product trains the steps 1, 2, ... with."""
    given = {"lr": PEAK, "min_lr": LOW, "global_batch_size": BATCH, **settings}
    train = Config().replaced(**given).train
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = _schedule(optimizer, train, decay_iters(train))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=BATCH)
    return found


def cosine(ratio: float) -> float:
    return (1 + math.cos(math.pi * ratio)) / 2


END = {
    "linear": lambda ratio: 1 - ratio,
    "cosine": cosine,
    "exponential": lambda ratio: 2 * 0.5**ratio - 1,
    "minus_sqrt": lambda ratio: 1 - math.sqrt(ratio),
}


def expected(done: int, style: str, total: int, warmup: float, last: int, end: str) -> float:
    """The rate after ``done`` steps: warm-up from 0, then ``style`` over ``total`` steps."""
    if warmup and done <= warmup:
        return PEAK * done / warmup
    if style == "constant":
        return PEAK
    if done > total:
        return LOW
    if style == "inverse-square-root":  # Megatron-LM counts samples, and knows no warm-up below 1
        return max(LOW, PEAK * math.sqrt(max(warmup * BATCH, 1) / max(done * BATCH, 1)))
    if style == "WSD":
        share = END[end](max(0, done - (total - last)) / last)
    else:
        share = END[style]((done - warmup) / (total - warmup))
    return LOW + share * (PEAK - LOW)


STYLES = [
    *((style, None) for style in ("constant", "linear", "cosine", "inverse-square-root")),
    *(("WSD", end) for end in END),
]


@pytest.mark.parametrize("warmup", [{}, {"lr_warmup_iters": 4}, {"lr_warmup_fraction": 0.15}])
@pytest.mark.parametrize("decay", [None, 12, 50])
@pytest.mark.parametrize(("style", "end"), STYLES)
def test_the_rate_of_each_step(
    style: str, end: str | None, decay: int | None, warmup: dict
) -> None:
    """20 steps: decay over them, over fewer, and over more than are run."""
    total = decay or 20
    wsd = {} if end is None else {"lr_wsd_decay_style": end, "lr_wsd_decay_iters": 6}
    found = rates(20, train_iters=20, lr_decay_style=style, lr_decay_iters=decay, **wsd, **warmup)
    steps = warmup.get("lr_warmup_iters", warmup.get("lr_warmup_fraction", 0) * total)
    for done, rate in enumerate(found):
        assert rate == pytest.approx(
            expected(done, style, total, steps, 6, end or ""), rel=1e-12
        ), done


def test_the_papers_schedule_is_flat_over_its_100_steps() -> None:
    """A cosine over 30 epochs of 29,434 problems, 32 a step, stopped at step 100."""
    train = parse_args(["--preset", "phf", "--hf-model", "m", "--data", "d"]).train
    assert train.lr_decay_iters == 30 * 29434 // 32 == 27594
    found = rates(100, **vars(train))
    assert found[0] == 5e-6
    assert f"{found[-1]:.4e}" == "4.9998e-06"
    # Without --lr-decay-iters it is another recipe: a third of the way down after a third.
    assert rates(100, **{**vars(train), "lr_decay_iters": None})[-1] < 2e-9


BAD = {
    "--lr-decay-iters 0": "--lr-decay-iters 0: need at least 1",
    "--lr-warmup-iters -1": "--lr-warmup-iters -1: need at least 0",
    "--lr-warmup-fraction 1": "--lr-warmup-fraction 1.0: need 0 to below 1",
    "--lr-warmup-fraction -0.1": "--lr-warmup-fraction -0.1: need 0 to below 1",
    "--lr-warmup-fraction 0.1 --lr-warmup-iters 3": "give one of the two",
    "--lr-warmup-iters 100": "--lr-warmup-iters 100: need less than --train-iters 100, or give",
    "--lr-warmup-iters 9 --lr-decay-iters 9": "need less than --lr-decay-iters 9",
    "--lr-decay-style WSD": "--lr-decay-style WSD and --lr-wsd-decay-iters belong together",
    "--lr-wsd-decay-iters 3": "--lr-decay-style WSD and --lr-wsd-decay-iters belong together",
    "--lr-decay-style WSD --lr-wsd-decay-iters 0": "--lr-wsd-decay-iters 0: need at least 1",
    "--lr-decay-style WSD --lr-wsd-decay-iters 101": "101: need at most --train-iters 100",
    "--lr-decay-style WSD --lr-wsd-decay-iters 9 --lr-decay-iters 8": "at most --lr-decay-iters 8",
}
GOOD = [
    "--lr-warmup-iters 100 --lr-decay-iters 101",
    "--lr-warmup-fraction 0 --lr-warmup-iters 0",
    "--lr-decay-style WSD --lr-wsd-decay-iters 100 --lr-wsd-decay-style minus_sqrt",
    "--train-iters 5 --lr-decay-iters 3 --lr-decay-style inverse-square-root",
]
REAL = ["--hf-model", "m", "--data", "d"]


@pytest.mark.parametrize("flags", BAD)
def test_a_schedule_that_is_none_is_refused(flags: str) -> None:
    config = parse_args([*REAL, *flags.split()])
    with pytest.raises(ValueError, match=r"^--lr-") as error:
        check_fields(config)
        check_schedule(config)
    assert BAD[flags] in str(error.value)


@pytest.mark.parametrize("flags", GOOD)
def test_schedules_that_hold(flags: str) -> None:
    check_schedule(parse_args([*REAL, *flags.split()]))


def test_the_embedded_task_gives_way() -> None:
    """Its own 20 steps of warm-up are no mistake of the user's."""
    short = parse_args(["--train-iters", "2"])
    assert short.train.lr_warmup_iters == 20
    check_schedule(short)
    fraction = parse_args(["--lr-warmup-fraction", "0.1"])
    assert fraction.train.lr_warmup_iters == 0
    check_schedule(fraction)
