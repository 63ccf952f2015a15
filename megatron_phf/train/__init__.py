"""The training job: its step in four parts, the loop around it, checkpoints, metrics.

``step`` reads as the method does.  May import all but ``report``, ``demo`` and ``cli``.
"""
