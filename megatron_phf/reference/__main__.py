"""Print the reference's metrics of one global batch.

python -m megatron_phf.reference --hf-model DIR --replay-file F.jsonl --alpha 0.05
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from megatron_phf.reference.method import compute, read_replay
from megatron_phf.reference.options import Options


def layer_numbers(text: str) -> tuple[int, ...]:
    """Of ``2,4,6``: (2, 4, 6)."""
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Print the metrics of one global batch as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-model", required=True)
    parser.add_argument("--replay-file", required=True)
    parser.add_argument("--teacher-hf-model")
    for f in dataclasses.fields(Options):
        flag = "--" + f.name.replace("_", "-")
        kind = type(f.default) if f.default is not None else layer_numbers
        parser.add_argument(flag, type=kind, default=f.default)
    given = vars(parser.parse_args())
    directory, replay = given.pop("hf_model"), given.pop("replay_file")
    teacher, o = given.pop("teacher_hf_model"), Options(**given)
    result = compute(directory, read_replay(replay), o, teacher_directory=teacher)
    print(json.dumps(result.metrics))


if __name__ == "__main__":
    main()
