"""A report of one or many runs: one HTML page that needs nothing but itself, and PNG files.

See megatron_phf/cli/report.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
