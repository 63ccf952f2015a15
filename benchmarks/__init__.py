"""Benchmarks of the product."""

import os

from megatron_phf.runtime.environment import set_cuda_defaults
from megatron_phf.runtime.optional_packages import hide_broken

# Here, before any of them imports torch or megatron-core.
set_cuda_defaults(os.environ)
hide_broken()
