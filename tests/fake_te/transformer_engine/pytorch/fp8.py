"""The FP8 context."""

import contextlib


class FP8GlobalStateManager:
    """Whether, and by which recipe, modules compute in FP8 now."""

    enabled = False
    recipe = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @staticmethod
    def is_fp8_available() -> tuple[bool, str]:
        return True, ""

    is_mxfp8_available = is_fp8_block_scaling_available = is_fp8_available


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
    """As Transformer Engine's."""
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe
    state.enabled, state.recipe = enabled, fp8_recipe
    try:
        yield
    finally:
        state.enabled, state.recipe = before


def fp8_model_init(*args, **kwargs):
    """What megatron-core imports; FP8 weights are not in the stand-in."""
    raise NotImplementedError
