"""Every line that ``make breakages`` breaks is there, once, and so are the tests that see it."""

from __future__ import annotations

import pytest

from tests.breakages.breakage import Breakage
from tests.breakages.losses import LOSSES
from tests.breakages.model import MODEL
from tests.breakages.run import RUN
from tests.launch import REPO


@pytest.mark.parametrize("breakage", [*LOSSES, *MODEL, *RUN], ids=lambda b: b.name)
def test_a_line_to_break_is_there_once(breakage: Breakage) -> None:
    assert (REPO / breakage.file).read_text().count(breakage.old) == 1
    assert breakage.new != breakage.old
    assert (REPO / breakage.tests[0]).exists()
