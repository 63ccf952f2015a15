"""What nobody has seen on a GPU, checked in ten minutes: a table to paste into an issue, and JSON.

See megatron_phf/cli/acceptance.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.acceptance import main

if __name__ == "__main__":
    sys.exit(main())
