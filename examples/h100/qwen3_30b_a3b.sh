#!/usr/bin/env bash
# Qwen3-30B-A3B on H100s: 8 GPUs, TP 2 x DP 4, whole experts over EP 8; adapters on the attention.  No published recipe.
#
#   bash examples/h100/qwen3_30b_a3b.sh path/to/Qwen3-30B-A3B problems.jsonl [more flags]
# With FP8: add --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
exec "${start[@]}" \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 \
    --preset phf_8b --lora-target-modules q_proj,k_proj,v_proj,o_proj --moe-aux-loss-coeff 0 \
    --max-tokens-per-microbatch 3072 --pack-sequences \
    --output-dir "runs/qwen3_30b_a3b" "$@"
