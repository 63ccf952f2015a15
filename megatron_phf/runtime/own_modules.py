"""Modules of the user's own, which flags name as ``package.module:attribute``."""

from __future__ import annotations

import os
import sys


def search_working_directory() -> None:
    """Modules of the working directory are importable too, behind all others."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
