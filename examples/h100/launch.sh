# Sourced by the recipes: NODES (1) machines of GPUS (8) GPUs each; on several, NODE_RANK and HEAD_NODE
# say which this is, and where the first one listens.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repo/.venv/bin/python" ]; then PATH="$repo/.venv/bin:$PATH"; fi
model=${1:?"usage: $0 path/to/model problems.jsonl [more flags]"}
data=${2:?"usage: $0 path/to/model problems.jsonl [more flags]"}
shift 2
start=(torchrun --nproc-per-node "${GPUS:-8}")
if [ "${NODES:-1}" -gt 1 ]; then
    start+=(--nnodes "$NODES" --node-rank "${NODE_RANK:?}" --rdzv-backend c10d)
    start+=(--rdzv-endpoint "${HEAD_NODE:?}:29500")
else
    start+=(--standalone)
fi
# The published recipe: 100 steps of 32 rollouts, AdamW 5e-6 with a cosine, clip 0.1, EMA teacher.
start+=("$repo/examples/pretrain_phf.sh" --hf-model "$model" --data "$data" --dtype bf16
    --train-iters 100 --global-batch-size 32 --lr 5e-6 --lr-decay-style cosine --clip-grad 0.1
    --teacher ema --ema-decay 0.999 --phf-alpha 0.05 --phf-window-size 128
    --opsd-beta 0 --opsd-clip-mode entry --max-new-tokens 1024 --rollout-temperature 1.1
    --rollout-top-p 0.95 --rollout-top-k 20 --use-distributed-optimizer --overlap-grad-reduce)
