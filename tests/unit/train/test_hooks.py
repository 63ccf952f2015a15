"""Hooks around the steps: their order, a reason to stop, what they find at the end."""

from __future__ import annotations

import pytest

from megatron_phf.train import loop
from megatron_phf.train.hooks import RunHook, Stop


class Noted(RunHook):
    """Notes its calls in ``seen``; may stop after step 4, or have a problem at the end."""

    def __init__(
        self, name: str, seen: list, stop: Stop | None = None, problem: str | None = None
    ) -> None:
        self.name, self.seen, self.stop, self.problem = name, seen, stop, problem

    def before_step(self, iteration):
        self.seen.append((self.name, "before", iteration))

    def after_step(self, iteration, metrics):
        self.seen.append((self.name, "after", iteration, metrics))
        return self.stop if iteration == 4 else None

    def at_end(self, iteration, stopped):
        self.seen.append((self.name, "end", iteration, stopped))
        return self.problem

    def close(self):
        self.seen.append((self.name, "close"))


class Steps:
    def __init__(self, seen: list, fails_at: int = 0) -> None:
        self.seen, self.fails_at = seen, fails_at

    def take(self, iteration):
        self.seen.append(("step", iteration))
        if iteration == self.fails_at:
            raise ValueError("no rollouts")
        return f"metrics {iteration}"


@pytest.fixture(autouse=True)
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(loop, "say", lines.append)
    return lines


def test_hooks_in_the_order_of_their_list(said) -> None:
    seen: list = []
    history = loop.run_steps(Steps(seen), [Noted("a", seen), Noted("b", seen)], 2, 3)
    assert history == ["metrics 3"] and said == []
    assert seen == [
        ("a", "before", 3), ("b", "before", 3), ("step", 3),
        ("a", "after", 3, "metrics 3"), ("b", "after", 3, "metrics 3"),
        ("a", "end", 3, False), ("b", "end", 3, False), ("b", "close"), ("a", "close"),
    ]  # fmt: skip


@pytest.mark.parametrize("finished", [False, True])
def test_a_reason_to_stop_ends_the_steps_and_every_hook_hears_of_it(said, finished) -> None:
    """Whoever gives it: the hooks before and behind end alike."""
    seen: list = []
    hooks = [Noted("a", seen, Stop("enough", finished)), Noted("b", seen)]
    assert len(loop.run_steps(Steps(seen), hooks, 2, 9)) == 2
    assert said == ["enough: ending after step 4"]
    ends = [("a", "end", 4, not finished), ("b", "end", 4, not finished)]
    assert [each for each in seen if each[1] == "end"] == ends
    assert ("b", "after", 4, "metrics 4") in seen and ("step", 5) not in seen


def test_a_problem_at_the_end_waits_for_the_hooks_behind() -> None:
    seen: list = []
    hooks = [Noted("a", seen, problem="disk full"), Noted("b", seen, problem="server gone")]
    with pytest.raises(ValueError, match=r"^disk full; server gone$"):
        loop.run_steps(Steps(seen), hooks, 0, 1)
    assert ("b", "end", 1, False) in seen and seen[-2:] == [("b", "close"), ("a", "close")]


def test_hooks_are_closed_where_a_step_fails() -> None:
    seen: list = []
    with pytest.raises(ValueError, match="no rollouts"):
        loop.run_steps(Steps(seen, fails_at=1), [Noted("a", seen)], 0, 1)
    assert seen[-1] == ("a", "close") and ("a", "end", 1, False) not in seen
