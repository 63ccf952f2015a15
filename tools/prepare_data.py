"""Rewrite a public data set as the JSONL that ``--data`` reads.

See megatron_phf/cli/prepare_data.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
