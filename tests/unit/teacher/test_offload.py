"""An offloaded teacher's weights are on the device within its passes and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from megatron_phf.config.field import choices_of
from megatron_phf.config.settings import MethodConfig
from megatron_phf.model.gpt import evaluating
from megatron_phf.teacher.average import WeightAverage
from megatron_phf.teacher.kinds import TEACHERS, EmaTeacher, StatelessTeacher
from megatron_phf.teacher.offload import HostWeights, TakingTurns
from tests.counted_device import CountedDevice


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountedDevice:
    counted = CountedDevice()
    counted.install(monkeypatch.setattr)
    return counted


class Chunk(torch.nn.Sequential):
    """Whose weights are all here (see ``wait_for_weights``)."""

    arriving: Callable[[], None] | None = None


def make_chunk(seed: int) -> Chunk:
    torch.manual_seed(seed)
    return Chunk(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_weights_come_and_go(counted: CountedDevice) -> None:
    chunk, x = make_chunk(1), torch.randn(5, 3)
    before = chunk(x)
    teacher = StatelessTeacher([chunk], HostWeights([chunk]).on_device)
    host = [p.data_ptr() for p in chunk.parameters()]
    assert counted.alive() == 0
    for _ in range(2):
        with teacher.active():
            assert counted.alive() == 4
            assert not {p.data_ptr() for p in chunk.parameters()} & set(host)
            assert torch.equal(chunk(x), before)
            head = chunk[1].weight.detach()
        assert counted.alive() == 1  # what is still held, as the output head during the student's
        assert torch.equal(head, chunk[1].weight)
        del head
        assert counted.alive() == 0
        assert [p.data_ptr() for p in chunk.parameters()] == host


@pytest.mark.parametrize("stay", [False, True])
def test_teachers_take_turns(counted: CountedDevice, stay: bool) -> None:
    """Two chunks of two models: at most one of each is there, beside what is still read."""
    x = torch.randn(5, 3)
    models = {name: [make_chunk(seed), make_chunk(seed + 9)] for name, seed in (("a", 1), ("b", 2))}
    expected = {name: [chunk(x) for chunk in of] for name, of in models.items()}
    chunks = [make_chunk(5), make_chunk(6)]

    def load(name: str) -> None:
        for chunk, own in zip(chunks, models[name], strict=True):
            chunk.load_state_dict(own.state_dict())

    teacher = StatelessTeacher(chunks, TakingTurns(chunks, ("a", "b"), load, stay).on_device)
    for turns in ("aab", "ba", "b"):
        assert counted.alive() == (8 if stay else 0)
        counted.most = 0
        with teacher.active() as switch:
            for name in turns:
                for number in (0, 1):  # one is at the next teacher before the other
                    switch(chunks[number], name)
                    assert torch.equal(chunks[number](x), expected[name][number])
        assert counted.most <= 8
    with teacher.active() as switch:
        switch(chunks[1], "b")
        head = chunks[1][1].weight.detach()
        switch(chunks[1], "a")
        assert torch.equal(head, models["b"][1][1].weight)  # what is read later, of a turn before


def test_an_error_in_a_pass_leaves_nothing_behind(counted: CountedDevice) -> None:
    chunk = make_chunk(1)
    weights = HostWeights([chunk])
    with pytest.raises(ZeroDivisionError), weights.on_device():
        1 / 0  # noqa: B018
    assert counted.alive() == 0


def test_the_average_is_updated_on_the_host(counted: CountedDevice) -> None:
    student, chunk = make_chunk(2), make_chunk(1)
    expected = WeightAverage([make_chunk(1)], 0.75)
    teacher = EmaTeacher([chunk], 0.75, HostWeights([chunk]).on_device)
    for _ in range(3):
        expected.update([student])
        teacher.update([student])
    assert counted.most == 0  # no weight went to the device for it
    with teacher.active():
        found = [p.data.clone() for p in chunk.parameters()]
    for ours, (_, wanted) in zip(found, expected.pairs(), strict=True):
        assert torch.equal(ours, wanted)


def test_a_bf16_average_stays_fp32_on_the_host() -> None:
    """Without CUDA both places are one: nothing is copied."""
    student, chunk = make_chunk(2).bfloat16(), make_chunk(1).bfloat16()
    teacher = EmaTeacher([chunk], 0.999, HostWeights([chunk]).on_device)
    where = [p.data_ptr() for p in chunk.parameters()]
    teacher.update([student])
    with teacher.active():
        assert [p.data_ptr() for p in chunk.parameters()] == where
    for p, average in teacher.average.pairs():
        assert (p.dtype, average.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(p.data, average.bfloat16())


def test_a_pass_that_reads_weights_waits_for_them_once() -> None:
    """--overlap-param-gather: rollouts, teachers and evaluations come right behind a step."""
    chunk, arrived = make_chunk(0), []
    chunk.arriving = lambda: arrived.append(chunk.training)
    for _ in range(2):
        with evaluating([chunk]):
            assert arrived == [True]  # before anything else


def test_every_choice_of_a_teacher_has_a_row() -> None:
    (field,) = [f for f in dataclasses.fields(MethodConfig) if f.name == "teacher"]
    assert choices_of(field.metadata) == tuple(TEACHERS)
