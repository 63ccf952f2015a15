"""Dequantise a GGUF model file into a HuggingFace directory, with transformers.

See megatron_phf/cli/gguf_to_hf.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.gguf_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
