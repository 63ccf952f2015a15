#!/usr/bin/env bash
# Parity, losses, resume, memory, speed and the flow loss's price on 1, 2 or 8 H100s, as a table to
# paste into an issue; at most ten minutes.  Rows that need Transformer Engine are skipped without it.
# Without CUDA: what of it makes sense on a CPU.  From a bare machine: first_run.sh beside this.
#
#   bash examples/h100/acceptance.sh [path/to/Qwen3-1.7B problems.jsonl] [--gpus 8] [--dry-run]
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repo/.venv/bin/python" ]; then PATH="$repo/.venv/bin:$PATH"; fi
exec python3 "$repo/tools/acceptance.py" "$@"
