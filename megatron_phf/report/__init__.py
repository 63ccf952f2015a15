"""The report of one or many runs: a page and its pictures.

No torch.  May import ``evaluation`` and what is below it; reads a run's files as foreign input.
"""
