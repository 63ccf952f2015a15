"""Does an exported model compute in transformers what the student computed in Megatron?

See megatron_phf/cli/check_export.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.check_export import main

if __name__ == "__main__":
    sys.exit(main())
