"""Play any rank of any job on one CPU, before a GPU hour is spent.

See megatron_phf/cli/dry_run.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.dry_run import main

if __name__ == "__main__":
    sys.exit(main())
