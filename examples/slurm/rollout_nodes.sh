# Sourced by pretrain_phf.sbatch with ROLLOUT_NODES above 0: the job's last nodes run a vLLM server each,
# from before the first step until the job's end; the others train.
#
# Settings (environment), beside those of launch.sh:
#   ROLLOUT_NODES   so many (default: 0, the models sample in process)
#   VLLM            the server's command there, in the container if there is one (default: vllm)
#   VLLM_FLAGS      its flags (default: --tensor-parallel-size and the GPUs of a node)
#   VLLM_MINUTES    within which each must answer (default: 30)
# The weights go as the run's --vllm-weight-sync says: torch_distributed (the default here), nccl, or adapter
# (with --lora-rank, over the file system that all nodes share).

value_of() { # FLAG DEFAULT ARGUMENTS...: the flag's last value
    local flag=$1 value=$2
    for ((i = 3; i <= $#; i++)); do
        case ${!i} in
            "$flag") local next=$((i + 1)); value=${!next:-} ;;
            "$flag="*) value=${!i#*=} ;;
        esac
    done
    echo "$value"
}

if [ "$ROLLOUT_NODES" -ge "${#nodes[@]}" ]; then
    echo "error: ROLLOUT_NODES=$ROLLOUT_NODES of ${#nodes[@]} node(s) leaves none to train" >&2
    exit 2
fi
serving=("${nodes[@]: -ROLLOUT_NODES}")
nodes=("${nodes[@]:0:${#nodes[@]}-ROLLOUT_NODES}")
port=$((31000 + SLURM_JOB_ID % 1000))
urls=$(printf ",http://%s:$port" "${serving[@]}")
way=$(value_of --vllm-weight-sync torch_distributed "$@")
flags+=(--rollout-engine vllm --vllm-url "${urls:1}" --vllm-weight-sync "$way")
read -ra server <<<"${VLLM:-vllm}"
read -ra server_flags <<<"${VLLM_FLAGS:---tensor-parallel-size $processes}"
case $way in
    adapter) server_flags+=(--enable-lora --max-lora-rank "$(value_of --lora-rank 0 "$@")") ;;
    torch_distributed | nccl) server_flags+=(--weight-transfer-config "{\"backend\": \"$way\"}") ;;
    *)
        echo "error: ROLLOUT_NODES: --vllm-weight-sync $way: need torch_distributed, nccl or adapter" >&2
        exit 2
        ;;
esac
server+=(serve "$(value_of --hf-model "" "$@")" --port "$port" "${server_flags[@]}")

answers() { # NODE: its server is up
    (exec 3<>"/dev/tcp/$1/$port" && printf 'GET /health HTTP/1.0\r\n\r\n' >&3 &&
        read -r -t 5 line <&3 && [[ $line == *" 200 "* ]]) 2>/dev/null
}

serve() { # start all servers, and wait until they answer
    local node end=$((SECONDS + 60 * ${VLLM_MINUTES:-30}))
    say "${#serving[@]} node(s) serve at ${urls:1}, logs $LOGS/vllm-*.log"
    # A server that dies is started again.  USR1, before the time limit, is for the ranks: they save what
    # they still wait for.
    VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 srun --kill-on-bad-exit=1 \
        --nodes="${#serving[@]}" --ntasks="${#serving[@]}" --ntasks-per-node=1 \
        --nodelist="$(listed "${serving[@]}")" \
        --output="$LOGS/vllm-%N.log" "${container[@]}" "${inside[@]}" \
        bash -c 'trap "" USR1; eval "$SETUP"
            for ((i = 0; i <= ${MAX_RESTARTS:-3}; i++)); do "$@"; echo "ended with $?"; sleep 1; done; exit 1' \
        vllm "${server[@]}" &
    servers=$!
    trap 'kill "$servers" 2>/dev/null || true; wait "$servers" || true' EXIT
    for node in "${serving[@]}"; do
        until answers "$node"; do
            if ! kill -0 "$servers" 2>/dev/null || [ "$SECONDS" -ge "$end" ]; then
                say "no vLLM server on $node; the end of $LOGS/vllm-$node.log:"
                tail -n 15 "$LOGS/vllm-$node.log"
                exit 1
            fi
            sleep 1
        done
    done
}
