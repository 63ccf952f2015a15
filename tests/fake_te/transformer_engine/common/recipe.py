"""FP8 recipes: only their names and settings."""

import enum


class Format(enum.Enum):
    """Of the numbers."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """Of all recipes: they take no other formats.  As pydantic's, they drop names they lack."""

    def _keep(self, fp8_format) -> None:
        if not isinstance(fp8_format, Format):
            raise ValueError(f"fp8_format: {fp8_format!r}")
        self.fp8_format = fp8_format


class DelayedScaling(Recipe):
    """Scales from the history."""

    def __init__(self, *, margin=0, fp8_format=Format.HYBRID, amax_history_len=1024,
                 amax_compute_algo="max", fp8_dpa=False, fp8_mha=False,
                 **others) -> None:  # fmt: skip
        self._keep(fp8_format)
        self.amax_history_len, self.amax_compute_algo = amax_history_len, amax_compute_algo


class Float8CurrentScaling(Recipe):
    """tensorwise"""

    def __init__(self, *, fp8_format=Format.HYBRID, fp8_dpa=False, fp8_mha=False, **others) -> None:
        self._keep(fp8_format)


class Float8BlockScaling(Recipe):
    """blockwise"""

    def __init__(self, *, fp8_format=Format.E4M3, fp8_dpa=False, fp8_mha=False, **others) -> None:
        self._keep(fp8_format)


class MXFP8BlockScaling(Recipe):
    """mxfp8"""

    def __init__(self, *, margin=0, fp8_format=Format.E4M3, fp8_dpa=False, fp8_mha=False,
                 **others) -> None:  # fmt: skip
        self._keep(fp8_format)
