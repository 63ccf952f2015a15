"""Your model, rollouts and layout: does the product compute what plain transformers computes?

See megatron_phf/cli/parity.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.parity import main

if __name__ == "__main__":
    sys.exit(main())
