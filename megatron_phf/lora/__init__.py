"""Adapters on megatron's linears, and PEFT's files.

May import ``model`` and what is below it.
"""
