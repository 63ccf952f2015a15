"""Average@k and its siblings: samples on the disk, graders, a grader's own process.

May import ``rollout`` and what is below it.
"""
