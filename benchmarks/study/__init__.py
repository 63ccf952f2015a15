"""Many tiny models trained at once, for studies of hundreds of runs on the embedded kind of task.

All weights of M models stand in one tensor; a rollout or a step is one batched computation for all
of them.  The losses are :mod:`megatron_phf.losses`; what is new is the model and the loop, which
tests/unit/test_study.py compares with transformers and with the training job itself.
"""
