"""Plan a run: predicted memory a rank and communication a step of each layout, the best first.

See megatron_phf/cli/plan.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
