"""Rollouts from the student itself, in this process: its layers with a KV cache, and the engine."""
