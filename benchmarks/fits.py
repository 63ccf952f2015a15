"""Laws fitted to measured points by least squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _least_squares(columns: Sequence[np.ndarray], y: np.ndarray) -> tuple[np.ndarray, float]:
    """(coefficients, R^2) of y as a sum of ``columns``."""
    matrix = np.stack(columns, axis=1)
    found, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    rest = y - matrix @ found
    spread = y - y.mean()
    return found, float(1 - (rest @ rest) / (spread @ spread))


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """y = c x^p on logarithmic axes: exponent p and R^2."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    (_, exponent), quality = _least_squares((np.ones_like(log_x), log_x), log_y)
    return {"exponent": float(exponent), "r2": quality}


def polynomial(x: Sequence[float], y: Sequence[float], degree: int) -> dict[str, float]:
    """y = c0 + c1 x + ...; each term's share of y at the largest x, and R^2.

    Powers of x / max x: as they are, the columns would differ by orders of magnitude.
    """
    values, target = np.asarray(x, float), np.asarray(y, float)
    scaled = values / values.max()
    found, quality = _least_squares([scaled**p for p in range(degree + 1)], target)
    names = ("constant", "linear", "quadratic")[: degree + 1]
    whole = found.sum()
    shares = {f"{name}_share": float(c / whole) for name, c in zip(names, found, strict=True)}
    return {**shares, "r2": quality}
