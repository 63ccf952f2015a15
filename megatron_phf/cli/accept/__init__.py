"""What ``tools/acceptance.py`` runs and judges.

``plan``: cases, their time and what is skipped; ``launch``: starts, timeouts and the deadline;
``measure``: the large model's process; ``rows``: verdicts; ``table``: markdown and JSON.
"""
