#!/usr/bin/env bash
# Qwen3-1.7B on H100s: 8 GPUs, data-parallel.  The paper's recipe (--preset phf).
#
#   bash examples/h100/qwen3_1.7b.sh path/to/Qwen3-1.7B problems.jsonl [more flags]
# With FP8: add --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
exec "${start[@]}" \
    --max-tokens-per-microbatch 6144 --pack-sequences \
    --output-dir "runs/qwen3_1.7b" "$@"
