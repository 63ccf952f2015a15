"""What a run takes, by formula: memory of a rank, FLOPs, MFU.

May import ``teacher`` and what is below it.
"""
