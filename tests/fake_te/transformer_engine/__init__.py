"""A stand-in for Transformer Engine on the CPU: its public classes, torch's arithmetic.

Signatures, parameter names and attributes are those that megatron-core 0.16 uses of version 2.4.
FP8 is not simulated; what is recorded is which module ran in an FP8 context, and each module has a
history that such a pass changes.
"""

from transformer_engine.recording import record

__version__ = "2.4.0"

from transformer_engine import common, pytorch

__all__ = ["__version__", "common", "pytorch", "record"]
