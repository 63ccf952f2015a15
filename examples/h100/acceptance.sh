#!/usr/bin/env bash
# What nobody has seen on a GPU, as a table to paste into an issue: ten minutes of one card, an hour of
# eight H100s, part by part as docs/gpu.md lists them, on all visible GPUs.  Rows that need Transformer
# Engine or vLLM are skipped without it.  Without CUDA: what of it makes sense on a CPU.
# From a bare machine: first_run.sh beside this.
#
#   bash examples/h100/acceptance.sh [path/to/Qwen3-1.7B problems.jsonl] [--gpus 8] [--parts step ...] [--dry-run]
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repo/.venv/bin/python" ]; then PATH="$repo/.venv/bin:$PATH"; fi
exec python3 "$repo/tools/acceptance.py" "$@"
