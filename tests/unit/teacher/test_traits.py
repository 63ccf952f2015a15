"""The table of teachers' traits against how each is made, and what the checks ask of it."""

from __future__ import annotations

import pytest

from megatron_phf.config.flags import parse_args
from megatron_phf.teacher import traits
from megatron_phf.teacher.architecture import check_teacher_flags
from megatron_phf.teacher.kinds import TEACHERS


def test_a_kind_is_made_as_its_traits_say() -> None:
    assert {*traits.TRAITS} == {*TEACHERS}
    for name, kind in TEACHERS.items():
        has = traits.TRAITS[name]
        assert (kind.on_weights is not None) == has.copy, name
        own_adapters = kind.on_adapters is not None or kind.on_student is not None
        assert own_adapters == has.adapters, name
    assert [name for name, has in traits.TRAITS.items() if has.follows] == ["ema", "live"]


def test_a_kind_without_adapters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = traits.TeacherTraits(adapters=False)
    monkeypatch.setitem(traits.TRAITS, "ema", plain)
    check_teacher_flags(parse_args(["--teacher", "ema"]))
    with pytest.raises(ValueError, match="--teacher ema has no form for adapters; leave out"):
        check_teacher_flags(parse_args(["--teacher", "ema", "--lora-rank", "8", "--hf-model", "x"]))
