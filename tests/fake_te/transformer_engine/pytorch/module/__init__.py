"""The real package's layout."""

from transformer_engine.pytorch.module import base

__all__ = ["base"]
