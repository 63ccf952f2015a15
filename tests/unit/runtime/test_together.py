"""What rank 0 gives or fails with reaches every rank, as pickles do; nobody is left waiting."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_every_rank, on_first_rank


class Refused(Exception):
    """One that no other process can read."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}:{line}")


def ranks(monkeypatch: pytest.MonkeyPatch, call: Callable[[int], Any]) -> list[Any]:
    """What ``call`` returns or raises on ranks 0 and 1, one after the other."""
    sent: list[bytes] = []

    def broadcast(value: Any, group: object) -> Any:
        if parallel.is_first_rank():
            sent.append(pickle.dumps(value))
            return value
        return pickle.loads(sent[0])

    found = []
    monkeypatch.setattr(parallel, "broadcast_object", broadcast)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "is_first_rank", lambda rank=rank: rank == 0)
        try:
            found.append(call(rank))
        except Exception as error:
            found.append(error)
    return found


def failing(error: Exception) -> None:
    raise error


def test_rank_0_alone_acts_and_all_have_what_it_gave(monkeypatch) -> None:
    did: list[str] = []

    def call(rank: int) -> dict:
        def act(name: str) -> dict:
            did.append(f"{name} on {rank}")
            return {"path": "x"}

        return on_first_rank(act, "act", meanwhile=lambda: did.append(f"the rest on {rank}"))

    assert ranks(monkeypatch, call) == [{"path": "x"}, {"path": "x"}]
    assert did == ["act on 0", "the rest on 0", "the rest on 1"]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("--save d: full"), ValueError, "--save d: full"),
        (OSError(28, "No space left", "d"), OSError, "[Errno 28] No space left: 'd'"),
        (json.JSONDecodeError("bad", "{", 1), ValueError, "bad: line 1 column 2 (char 1)"),
    ],
)
def test_the_same_error_everywhere(monkeypatch, error: Exception, kind: type, text: str) -> None:
    rest: list[int] = []

    def call(rank: int) -> None:
        on_first_rank(failing, error, meanwhile=lambda: rest.append(rank))

    found = ranks(monkeypatch, call)
    assert found[0] is error and rest == [0, 1]
    assert isinstance(found[1], kind) and str(found[1]) == text


def test_an_error_that_does_not_travel_is_named(monkeypatch) -> None:
    """Rank 0 keeps it, with its traceback."""
    found = ranks(monkeypatch, lambda rank: on_first_rank(failing, Refused("a", 3)))
    assert isinstance(found[0], Refused)
    assert type(found[1]) is RuntimeError and str(found[1]) == "Refused: a:3"
    assert "in failing" in "".join(found[1].__notes__)


def test_a_fault_brings_its_traceback_along(monkeypatch) -> None:
    _, there = ranks(monkeypatch, lambda rank: on_first_rank(failing, KeyError("x")))
    assert isinstance(there, KeyError) and "in failing" in "".join(there.__notes__)
    _, mistake = ranks(monkeypatch, lambda rank: on_first_rank(failing, ValueError("x")))
    assert not hasattr(mistake, "__notes__")


def test_the_first_ranks_error_is_all_ranks(monkeypatch) -> None:
    there = [None, ValueError("of rank 1"), ValueError("of rank 2")]
    monkeypatch.setattr(parallel, "gather_objects", lambda mine, group: there)
    with pytest.raises(ValueError, match="of rank 1"):
        on_every_rank(lambda: "mine")
    monkeypatch.setattr(parallel, "gather_objects", lambda mine, group: [mine, None])
    assert on_every_rank(sum, [1, 2]) == 3
