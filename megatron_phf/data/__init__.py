"""Problems, prompts, batches, recorded rollouts, and the embedded task."""
