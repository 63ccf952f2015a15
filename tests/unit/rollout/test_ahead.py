"""Rollouts sampled while steps train: by which weights, what is waited for, what a failure does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.rollouts import (
    Rollout,
    read_rollouts,
    read_sampled,
    rollout_to_json,
    write_sampled,
)
from megatron_phf.rollout import ahead as ahead_module
from megatron_phf.rollout.ahead import AheadSource
from megatron_phf.rollout.checked import CheckedEngineBeside
from megatron_phf.rollout.engines import make_by_factory
from megatron_phf.rollout.order import ProblemOrder, ResponseRoom
from megatron_phf.rollout.protocol import Response, WeightsLost
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm.gate import Gate
from megatron_phf.rollout.workers import Workers
from megatron_phf.runtime import parallel
from megatron_phf.train.metrics import rollout_staleness

SAMPLING = SamplingParams(1.0, 1.0, 0, 3, (1,), seed=3)
PAIRS = [PromptPair(Problem("", "", None, i), (i,), (i, i)) for i in range(6)]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "local_share", list)
    monkeypatch.setattr(parallel, "decides_for_model", lambda: True)
    monkeypatch.setattr(parallel, "gather_objects", lambda value, group=None: [value])
    monkeypatch.setattr(parallel, "share_object", lambda value: value)
    monkeypatch.setattr(parallel, "gather_over_data_parallel", lambda value: [value])
    monkeypatch.setattr(parallel, "max_over_ranks", lambda values: [float(v) for v in values])


class Served:
    """Answers with the version of its weights and the prompt; ``log``: what came in which order."""

    def __init__(self, before: Callable[[int], None] = lambda step: None) -> None:
        self._before, self._version = before, 0
        self.log: list[tuple[str, int]] = []

    def prepare(self, step: int) -> None:
        self._version = step
        self.log.append(("weights", step))

    def generate(self, prompts, sampling, sample_ids, limits=None):
        raise AssertionError("sampled in the main thread")

    def sampler(self, prompts, sampling, sample_ids, limits=None):
        version, step = self._version, sample_ids[0] // 2 + 1
        self.log.append(("asked", step))

        def sample() -> list[Response]:
            self._before(step)
            ids = [[version, prompt[0]] for prompt in prompts]
            return [Response(each, [-1.0, -2.0], None, version, version + 1) for each in ids]

        return sample


def source(engine: Served, steps_ahead: int, last: int = 5) -> AheadSource:
    config = Config().replaced(
        max_off_policy_steps=steps_ahead, train_iters=last, rollout_engine="own:f",
        distributed_timeout_minutes=0.01,
    )  # fmt: skip
    checked = CheckedEngineBeside(engine, "own:f", 32)
    return AheadSource(checked, ProblemOrder(PAIRS, 2, 4), SAMPLING, ResponseRoom(9, 9, 3), config)


@pytest.mark.parametrize(
    ("steps_ahead", "versions"), [(1, [1, 1, 2, 3, 4]), (2, [1, 1, 1, 2, 3]), (9, [1] * 5)]
)
def test_each_step_trains_on_what_was_asked_that_many_steps_before(steps_ahead, versions) -> None:
    engine = Served()
    ahead = source(engine, steps_ahead)
    order = ProblemOrder(PAIRS, 2, 4)
    for step, version in enumerate(versions, start=1):
        rollouts, asked = ahead.rollouts(step), order.share(step)[1]
        assert [r.student_prompt_ids for r in rollouts] == [p.student_ids for p in asked]
        assert [r.response_ids for r in rollouts] == [(version, *p.student_ids) for p in asked]
        assert {r.log_probs for r in rollouts} == {(-1.0, -2.0)}
        spans = {(r.policy_version, r.policy_version_end) for r in rollouts}
        assert spans == {(version, version + 1)}
    # New weights where something is sampled with them, and each step is asked for once.
    assert [step for what, step in engine.log if what == "asked"] == [1, 2, 3, 4, 5]
    weights = [step for what, step in engine.log if what == "weights"]
    assert weights == list(range(1, max(5 - steps_ahead, 1) + 1))
    if steps_ahead == 1:
        assert engine.log[:3] == [("weights", 1), ("asked", 1), ("asked", 2)]
        assert engine.log[3:5] == [("weights", 2), ("asked", 3)]


def test_staleness_is_of_the_weights_that_began_a_rollout_and_of_those_that_ended_it() -> None:
    spans = [(3, 5), (5, 6), (7, None), (None, None)]
    rollouts = [Rollout((1,), (2,), (4,), None, None, *span) for span in spans]
    wanted = {"mean": 2.0, "max": 4, "ended": 2}
    assert rollout_staleness(7, rollouts) == {"rollout_staleness": wanted}
    assert rollout_staleness(7, rollouts[3:]) == {}


def test_what_is_waited_for_and_what_goes_on_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the test's own clock: step 3's rollouts take 0.2 s of 0.3, step 4's end 0.1 s late."""
    now, (begun, go) = 10.0, ({3: threading.Event(), 4: threading.Event()} for _ in range(2))
    monkeypatch.setattr(ahead_module.time, "perf_counter", lambda: now)

    def before(step: int) -> None:
        nonlocal now
        if step in go:
            begun[step].set()
            go[step].wait(5)
            now += {3: 0.2, 4: 0.1}[step]

    ahead = source(Served(before), 1)
    ahead.rollouts(1), ahead.rollouts(2)
    begun[3].wait(5)
    now = 20.0
    ahead.beside()
    go[3].set()
    ahead._pending[3].result(60)
    now += 0.1
    ahead.rollouts(3)
    beside = ahead.beside()
    assert (beside.waited, beside.overlap) == (0.0, pytest.approx(2 / 3))
    begun[4].wait(5)
    now += 0.1
    result = ahead._result
    ahead._result = lambda *given: go[4].set() or result(*given)
    ahead.rollouts(4)
    beside = ahead.beside()
    assert (beside.waited, beside.overlap) == (pytest.approx(0.1), pytest.approx(0.5))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no server"), "no server"),
        (KeyError("x"), r"own:f: sampling beside training failed \(KeyError: 'x'\)"),
        (SystemExit(3), r"own:f: sampling beside training failed \(SystemExit: 3\)"),
    ],
)
def test_a_sampler_that_fails_ends_the_step_that_needs_it(error, message: str) -> None:
    def before(step: int) -> None:
        if step == 3:
            raise error

    ahead = source(Served(before), 2)
    ahead.rollouts(1)
    # A checkpoint keeps what there is; the failure is not forgotten.
    assert list(ahead.sampled()) == [2]
    ahead.rollouts(2)
    with pytest.raises(ValueError, match=message):
        ahead.rollouts(3)


def test_answers_that_are_wrong_too_old_or_never_come() -> None:
    engine = Served()
    engine.sampler = lambda *given: lambda: [Response([99])] * 2
    with pytest.raises(ValueError, match=r"own:f: response 0: token ids from 99 to 99"):
        source(engine, 1).rollouts(1)
    engine.sampler = lambda *given: lambda: [Response([4], policy_version=v) for v in (2, 1)]
    ahead = source(engine, 1)
    ahead.rollouts(1), ahead.rollouts(2)
    with pytest.raises(ValueError, match=r"response for step 3 is by the weights of step 1, mo"):
        ahead.rollouts(3)
    never = threading.Event()
    with pytest.raises(ValueError, match=r"rollouts of step 1 are not there after waiting for 1 s"):
        source(Served(lambda step: never.wait()), 1).rollouts(1)


def test_weights_that_a_server_lost_are_brought_and_the_step_sampled_anew() -> None:
    """At once where a step needs them; what is saved for a step to come has the next step's."""
    losing = [2, 4]

    def before(step: int) -> None:
        if step in losing:
            losing.remove(step)
            raise WeightsLost("http://a:1: restarted")

    engine = Served(before)
    ahead = source(engine, 2)
    ahead.rollouts(1)
    assert {r.policy_version for r in ahead.rollouts(2)} == {2}
    assert engine.log[4:] == [("weights", 2), ("asked", 2), ("weights", 2), ("asked", 4)]
    sampled = ahead.sampled()
    assert {step: rollouts[0].policy_version for step, rollouts in sampled.items()} == {3: 1, 4: 3}
    assert engine.log[8:] == [("weights", 3), ("asked", 4)] and not losing

    def always(step: int) -> None:
        raise WeightsLost("http://a:1: restarted")

    with pytest.raises(ValueError, match=r"step 1 were lost 5 times, at last with: http://a:1: r"):
        source(Served(always), 1).rollouts(1)


def test_a_resumed_run_trains_on_what_was_sampled(tmp_path: Path) -> None:
    """Nothing is lost, repeated or sampled again; and both go on alike."""
    first, second = Served(), Served()
    straight = source(first, 2)
    for step in (1, 2):
        straight.rollouts(step)
    path = str(tmp_path / "rollouts.jsonl")
    write_sampled(path, straight.sampled())
    resumed = source(second, 2)
    assert resumed.restore(read_sampled(path)) == [3, 4]
    for step in (3, 4, 5):
        assert resumed.rollouts(step) == straight.rollouts(step)
    assert second.log == first.log[-2:] == [("weights", 3), ("asked", 5)]


def test_what_is_too_old_for_a_resumed_run_is_sampled_again() -> None:
    straight, engine = source(Served(), 2), Served()
    straight.rollouts(1), straight.rollouts(2)
    resumed = source(engine, 1)
    # Step 3's are by the weights of step 1, step 4's by those of step 2.
    assert resumed.restore(straight.sampled()) == []
    assert [r.policy_version for r in resumed.rollouts(3)] == [3, 3]


def test_sampled_rollouts_keep_all_that_is_known(tmp_path: Path) -> None:
    rollouts = [
        Rollout((1,), (2, 3), (4, 5), (-0.25, -1.5), (True, False), 7, 8),
        Rollout((1,), (2, 3), ()),
    ]
    path = str(tmp_path / "rollouts.jsonl")
    write_sampled(path, {9: rollouts, 10: rollouts[:1]})
    assert read_sampled(path) == {9: rollouts, 10: rollouts[:1]}
    # A replay file is read in the same way; and has log-probabilities where they are asked for.
    line = rollout_to_json(rollouts[0])
    assert "log_probs" not in line and rollout_to_json(rollouts[1], log_probs=True).keys() == {
        "student_prompt_ids", "teacher_prompt_ids", "response_ids"
    }  # fmt: skip
    for change, message in (
        ({"log_probs": [0.5]}, r":1: 'log_probs' is not a list of 2 finite numbers"),
        ({"log_probs": [0.5, None]}, r":1: 'log_probs' is not a list of 2 finite numbers"),
        ({"kept": 1}, r":1: 'kept' is neither true nor false"),
    ):
        (tmp_path / "replay.jsonl").write_text(json.dumps(line | change))
        with pytest.raises(ValueError, match=message):
            read_rollouts(str(tmp_path / "replay.jsonl"), 32)


def test_workers_begin_in_order_and_never_too_many() -> None:
    at_once, most, order, lock = 0, 0, [], threading.Lock()
    all_there = threading.Barrier(3)

    def task(number: int) -> int:
        nonlocal at_once, most
        with lock:
            order.append(number)
            at_once += 1
            most = max(most, at_once)
        all_there.wait(60)
        with lock:
            at_once -= 1
        return number

    workers = Workers(3, "test")
    futures = [workers.submit(lambda n=n: task(n)) for n in range(9)]
    assert [future.result(60) for future in futures] == list(range(9))
    assert most == 3 and sorted(order[:3]) == [0, 1, 2]
    waiting = threading.Event()
    blocked = [workers.submit(waiting.wait) for _ in range(3)]
    late = workers.submit(lambda: order.append(99))
    assert late.cancel()
    waiting.set()
    assert all(future.result(60) for future in blocked) and 99 not in order
    with pytest.raises(SystemExit):
        workers.submit(lambda: exec("raise SystemExit")).result(60)
    assert workers.submit(lambda: 5).result(60) == 5  # the thread lives on


def test_a_closed_gate_waits_for_those_within_and_holds_the_others() -> None:
    gate, log, inside, leave = Gate(), [], threading.Event(), threading.Event()

    def request(name: str) -> None:
        with gate.passed():
            log.append(f"{name} in")
            inside.set()
            leave.wait(60)
            log.append(f"{name} out")

    first = threading.Thread(target=request, args=("a",))
    first.start()
    inside.wait(60)
    with pytest.raises(ValueError, match=r"--vllm-url: 1 request\(s\) still run, and new weights"):
        gate.close(time.monotonic() + 0.05)
    threading.Timer(0.05, leave.set).start()
    gate.close(time.monotonic() + 60)
    second = threading.Thread(target=request, args=("b",))
    second.start()
    second.join(0.05)
    log.append("weights")
    gate.open()
    first.join(5), second.join(5)
    assert log == ["a in", "a out", "weights", "b in", "b out"]


AHEAD = ["--max-off-policy-steps"]
SERVED = ["--hf-model", "x", "--data", "y", "--rollout-engine", "vllm", "--vllm-url", "http://a:1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*AHEAD, "-1"], "--max-off-policy-steps -1: need at least 0"),
        ([*AHEAD, "1"], r"--max-off-policy-steps 1: --rollout-engine megatron samples in the proc"),
        (
            [*AHEAD, "2", "--rollout-engine", "replay", "--replay-file", "r", "--hf-model", "x"],
            "--max-off-policy-steps 2: --rollout-engine replay samples nothing",
        ),
        (
            [*SERVED, *AHEAD, "1", "--vllm-sync-interval", "2"],
            "--vllm-sync-interval 2 makes roll",
        ),
        (
            [*SERVED, *AHEAD, "1", "--vllm-colocated"],
            "--vllm-colocated: servers and training take turns on the same GPUs, and --max-off-",
        ),
        (["--rollouts-per-problem", "0"], "--rollouts-per-problem 0: need at least 1"),
        (
            ["--rollouts-per-problem", "5"],
            "--global-batch-size 32 is not a multiple of --roll",
        ),
        (
            ["--keep-rollouts", "correct"],
            "--keep-rollouts correct needs --data with answers",
        ),
        (
            ["--importance-ratio-cap", "2"],
            "--importance-ratio-cap needs the log-probabilities",
        ),
        ([*SERVED, "--importance-ratio-cap", "0"], "--importance-ratio-cap 0.0: need above 0"),
    ],
)
def test_what_is_refused_before_launch(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preflight.check(parse_args(flags))


def test_an_own_engine_says_that_it_can() -> None:
    name = "tests.own_engines:in_process"
    with pytest.raises(ValueError, match=r"^--max-off-policy-steps: .*Scripted without sampler,"):
        make_by_factory(name, None, beside=True)
    make_by_factory(name, None)
