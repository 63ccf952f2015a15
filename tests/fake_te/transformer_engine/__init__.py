"""A stand-in for Transformer Engine on the CPU: its public classes, torch's arithmetic.

Signatures, parameter names and attributes are those of version 2.16.1 (tests/real_te compares).
FP8 is not simulated; what is recorded is which module ran in an FP8 context, and each module has a
history that such a pass changes.
"""

from transformer_engine.recording import record

__version__ = "2.16.1"

from transformer_engine import common, pytorch

__all__ = ["__version__", "common", "pytorch", "record"]
