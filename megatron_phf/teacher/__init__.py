"""The privileged teacher: its kinds, another model, its average, where its weights are kept.

May import ``weights`` and what is below it.
"""
