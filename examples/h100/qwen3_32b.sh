#!/usr/bin/env bash
# Qwen3-32B on H100s: 4 nodes of 8 GPUs, TP 8 x PP 2 x DP 2, all weights trained.  No published recipe.
#
#   NODE_RANK=0 (to 3) HEAD_NODE=host bash examples/h100/qwen3_32b.sh path/to/model problems.jsonl
# With FP8: add --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16
NODES=${NODES:-4}
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
exec "${start[@]}" \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --sequence-parallel \
    --max-tokens-per-microbatch 3072 --pack-sequences \
    --recompute-granularity full --recompute-num-layers 1 \
    --preset phf_8b --lora-rank 0 --teacher-offload \
    --output-dir "runs/qwen3_32b" "$@"
