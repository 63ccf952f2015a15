#!/usr/bin/env bash
# Qwen3-8B on H100s: 8 GPUs, TP 2 x DP 4.  The paper's recipe for 8B (--preset phf_8b).
#
#   bash examples/h100/qwen3_8b.sh path/to/Qwen3-8B problems.jsonl [more flags]
# With FP8: add --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
exec "${start[@]}" \
    --preset phf_8b --tensor-model-parallel-size 2 --sequence-parallel \
    --max-tokens-per-microbatch 6144 --pack-sequences \
    --output-dir "runs/qwen3_8b" "$@"
