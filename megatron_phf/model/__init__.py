"""The student and teacher model on Megatron-Core: architectures, layers, attention, experts, FP8.

May import ``hidden`` (the tap in the layers), ``data`` and what is below them.
"""
