#!/usr/bin/env bash
# LoRA PHF on a real pretrained model: SmolLM2-135M-Instruct on GSM8K with the paper's adapters (rank
# 64, alpha 128, all seven linears), TP = 2; adapter and merged model exported and compared, the
# first by peft.  Needs what examples/smollm2_gsm8k.sh does, and peft.
#
#   bash examples/smollm2_lora_gsm8k.sh path/to/gsm8k_train.jsonl [output directory] [more flags]
set -euo pipefail
gsm8k=${1:?"usage: $0 path/to/gsm8k_train.jsonl [output directory] [more flags]"}
out=${2:-runs/smollm2_lora_gsm8k}
repo=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repo/.venv/bin/python" ]; then PATH="$repo/.venv/bin:$PATH"; fi

bash "$repo/examples/smollm2_gsm8k.sh" "$gsm8k" "$out" \
    --lora-rank 64 --lora-alpha 128 --lr 1e-4 --save-adapter "$out/adapter" "${@:3}"
python3 "$repo/tools/check_export.py" "$out/adapter" "$out/export_probe.safetensors"
