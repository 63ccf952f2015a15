"""A grid of runs: every variant with every seed, one command, resumable.

See megatron_phf/cli/grid.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.grid import main

if __name__ == "__main__":
    sys.exit(main())
