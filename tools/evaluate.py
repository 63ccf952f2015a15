"""Average@k, pass@k and majority@k of a model, in any layout: k sampled answers, graded.

See megatron_phf/cli/evaluate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's own package

from megatron_phf.cli.evaluate import main

if __name__ == "__main__":
    main()
