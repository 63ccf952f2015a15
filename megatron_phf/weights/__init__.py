"""A model's weights in and out: HuggingFace directories, megatron's distributed format.

May import ``lora``, ``model`` and what is below them.
"""
