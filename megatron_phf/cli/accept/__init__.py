"""What ``tools/acceptance.py`` runs and judges.

``plan``: parts, cases, their limits, what is skipped; ``launch``: starts, timeouts, the deadline;
``large``, ``measure``: the large model's process; ``verdicts``: rows; ``table``: markdown and JSON.
"""
