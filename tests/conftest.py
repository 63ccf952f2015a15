"""Options of the test run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Flags of the layout matrix (tests/parallel/test_matrix.py)."""
    parser.addoption(
        "--matrix-strength", type=int, default=2, help="cover all combinations of so many values"
    )
    parser.addoption("--matrix-processes", type=int, default=8, help="processes at most")
    parser.addoption("--matrix-report", default=None, help="write the deviations to this JSON file")
