"""The hidden-state loss: its terms, the targets they need of the teacher, the tap in the layers.

``term``, ``spec`` and ``layer_map`` need the standard library alone, ``states`` and ``loss`` torch,
the rest megatron-core.  May import ``config`` and ``runtime``.
"""
