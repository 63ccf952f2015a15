"""A report of one or many runs: one HTML page that needs nothing but itself, and PNG files.

    python tools/report.py runs/study --output runs/study/report --baseline opsd

RUN is a directory with run.json (--output-dir of a training run) or a folder above several; runs of
one name are seeds of one variant.  docs/evaluation.md says what the page shows.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_phf.console import program
from megatron_phf.report.page import write_report
from megatron_phf.report.runs import read_variants


@program
def main(argv: list[str] | None = None) -> int:
    """Write the report; 2 and one error line for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a folder of runs")
    parser.add_argument(
        "--output", default=None, help="directory (default: report in the first RUN)"
    )
    parser.add_argument("--baseline", default=None, help="run name to compare with (default: opsd)")
    args = parser.parse_args(argv)
    output = args.output or os.path.join(args.runs[0], "report")
    variants = read_variants(args.runs)
    path = write_report(variants, output, args.baseline)
    print(f"{sum(len(v.runs) for v in variants)} runs of {len(variants)} variants: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
