"""The embedded arithmetic task as files, for the job on a HuggingFace model, and for studies.

See megatron_phf/cli/make_embedded.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.make_embedded import main

if __name__ == "__main__":
    main()
