"""Files from elsewhere, read as foreign input, and files of ours that are whole or as they were.

May import ``config`` and ``runtime``.
"""
