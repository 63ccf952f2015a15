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
    echo "machine $NODE_RANK: waits at $HEAD_NODE:29500 until all $NODES machines have come" >&2
else
    start+=(--standalone --local-addr localhost)
fi
# PHF's recipe, docs/recipes.md: 100 steps of 32 rollouts, AdamW at 5e-6 (a cosine so long that it is flat),
# clip 0.1, EMA teacher, LoRA of rank 64.  Later flags win.
start+=("$repo/examples/pretrain_phf.sh" --preset phf --hf-model "$model" --data "$data"
    --dtype bf16 --use-distributed-optimizer --overlap-grad-reduce)
