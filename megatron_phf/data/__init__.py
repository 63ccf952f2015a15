"""Problems, prompts, tokenizers, rollouts and their files, batches of them.

Without megatron-core.  May import ``losses`` (windows) and what is below it.
"""
