"""FP8 recipes: only their names and settings."""

import enum


class Format(enum.Enum):
    """Of the numbers."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """Keeps what it was made with."""

    def __init__(self, **settings) -> None:
        self.settings = settings


class DelayedScaling(Recipe):
    """Scales from the history."""

    def __init__(self, margin=0, fp8_format=None, amax_history_len=1024, amax_compute_algo="max",
                 override_linear_precision=None, params_dtype=None, device=None, fp8_dpa=False,
                 fp8_mha=False) -> None:  # fmt: skip
        super().__init__(
            fp8_format=fp8_format,
            amax_history_len=amax_history_len,
            amax_compute_algo=amax_compute_algo,
        )


class Float8CurrentScaling(Recipe):
    """tensorwise"""


class Float8BlockScaling(Recipe):
    """blockwise"""


class MXFP8BlockScaling(Recipe):
    """mxfp8"""
