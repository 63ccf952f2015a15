"""Convert between HuggingFace directories and Megatron checkpoints.

See megatron_phf/cli/convert_checkpoint.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
