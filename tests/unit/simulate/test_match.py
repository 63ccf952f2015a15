"""Logs of ranks against each other, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_phf.simulate.match import mismatches

PAIR, WORLD = ("TP", (0, 1)), ("world", (0, 1, 2, 3))


def op(group: tuple, name: str = "allreduce", site: str = "a.py:1", **more: Any) -> dict:
    fields = {"shape": [4], "dtype": "bfloat16", "host": False, "blocking": True, "peer": None}
    fields |= {"batch": None, "name": name, "group": group[0], "ranks": group[1], "site": site}
    return {**fields, **more}


def send(peer: int, **more: Any) -> dict:
    return op(("PP", (0, 1)), "send", peer=peer, blocking=False, **more)


def receive(peer: int, **more: Any) -> dict:
    return op(("PP", (0, 1)), "recv", peer=peer, blocking=False, **more)


@pytest.mark.parametrize(
    "logs",
    [
        {0: [op(PAIR), op(WORLD)], 1: [op(PAIR), op(WORLD)], 3: [op(WORLD)]},
        {0: [send(1), receive(1)], 1: [receive(0), send(0)]},
        # Posted together: the order within does not matter.
        {0: [receive(1, batch=0), send(1, batch=0)], 1: [receive(0, batch=0), send(0, batch=0)]},
        # Nobody waits for what is asynchronous.
        {
            0: [op(PAIR, blocking=False), op(WORLD)],
            1: [op(WORLD), op(PAIR, blocking=False)],
        },
        # What is routed to a rank, and what it pickles, may have a size of its own.
        {0: [op(PAIR, "alltoall_base", shape=[3])], 1: [op(PAIR, "alltoall_base", shape=[5])]},
        {
            0: [op(PAIR, "allgather", shape=[3], dtype="uint8", host=True)],
            1: [op(PAIR, "allgather", shape=[9], dtype="uint8", host=True)],
        },
        # The other end is not played.
        {0: [send(1), op(WORLD)]},
    ],
)
def test_what_goes_together(logs: dict) -> None:
    assert mismatches(logs) == []


@pytest.mark.parametrize(
    ("logs", "text"),
    [
        (
            {0: [op(PAIR, shape=[4])], 1: [op(PAIR, shape=[5], site="b.py:2")]},
            "TP, operation 1: rank 0 is in allreduce of TP, bfloat16 [4], at a.py:1; "
            "rank 1 is in allreduce of TP, bfloat16 [5], at b.py:2",
        ),
        (
            {0: [op(PAIR), op(PAIR, dtype="float32")], 1: [op(PAIR)]},
            "TP: rank 0 is in allreduce of TP, float32 [4], at a.py:1, to which rank 1 never comes",
        ),
        (
            {0: [op(PAIR, "broadcast")], 1: [op(PAIR)]},
            "rank 0 is in broadcast of TP, bfloat16 [4], at a.py:1; rank 1 is in allreduce",
        ),
        (
            {0: [send(1, shape=[4])], 1: [receive(0, shape=[2, 2], site="b.py:2")]},
            "messages from rank 0 to 1, operation 1: rank 0 is in send to rank 1, bfloat16 [4], at "
            "a.py:1; rank 1 is in recv from rank 0, bfloat16 [2, 2], at b.py:2",
        ),
        (
            {0: [receive(1), send(1)], 1: [receive(0, site="b.py:2"), send(0)]},
            "these ranks wait for each other: rank 0 waits in recv from rank 1, bfloat16 [4], at "
            "a.py:1; rank 1 waits in recv from rank 0, bfloat16 [4], at b.py:2",
        ),
        (
            {0: [op(PAIR), op(WORLD)], 1: [op(WORLD, site="b.py:2"), op(PAIR)]},
            "these ranks wait for each other: rank 0 waits in allreduce of TP, bfloat16 [4], at "
            "a.py:1; rank 1 waits in allreduce of world, bfloat16 [4], at b.py:2",
        ),
        # A receive on one rank behind a collective that the sender only reaches after it.
        (
            {0: [op(PAIR), send(1)], 1: [receive(0), op(PAIR)]},
            "these ranks wait for each other: ",
        ),
    ],
)
def test_what_hangs_is_named_with_both_lines(logs: dict, text: str) -> None:
    found = mismatches(logs)
    assert len(found) == 1 and text in found[0], found
