"""The student and teacher model on Megatron-Core, and its HuggingFace weights."""
