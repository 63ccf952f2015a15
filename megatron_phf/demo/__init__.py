"""The embedded task and ``make demo``: nothing to download, a few minutes on CPUs.

May import ``train``, ``report`` and what is below them.
"""
