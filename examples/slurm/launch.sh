# Sourced by the job scripts beside it: one torchrun a node, in a container where one is named.
#
# Settings (environment; `sbatch --export=ALL,NAME=value` or `NAME=value sbatch` sets them):
#   REPO                 this repository, on a file system that all nodes share (default: the folder
#                        that sbatch was called in)
#   PROCESSES_PER_NODE   ranks a node (default: the GPUs that SLURM gave the job on each node)
#   OUTPUT_DIR           checkpoints, metrics and logs (default: runs/JOBNAME-JOBID)
#   MAX_RESTARTS         restarts of all ranks in place after one has failed (default: 3)
#   CONTAINER_IMAGE      image for srun --container-image (pyxis/enroot); default: no container
#   CONTAINER_MOUNTS     srun --container-mounts (default: REPO at its own path)
#   CONTAINER_COMMAND    any other way in, put before each command: "apptainer exec --nv IMAGE"
#   SETUP                commands for each node before torchrun: "module load cuda"
set -euo pipefail
REPO=${REPO:-${SLURM_SUBMIT_DIR:?"start this with sbatch"}}
cd "$REPO"
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
OUTPUT_DIR=${OUTPUT_DIR:-runs/$SLURM_JOB_NAME-${job:-$SLURM_JOB_ID}}
LOGS=$OUTPUT_DIR/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir -p "$LOGS"
[ ! -x .venv/bin/python ] || [ -n "${CONTAINER_IMAGE:-}" ] || PATH=$REPO/.venv/bin:$PATH
export PATH REPO LOGS SETUP=${SETUP:-:}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
: "${processes:?"no GPUs in this job: ask with --gpus-per-node=N, or set PROCESSES_PER_NODE"}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
rendezvous=$head:$((20000 + SLURM_JOB_ID % 10000))
container=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$REPO")
    container+=(--container-mounts="${CONTAINER_MOUNTS:-$REPO:$REPO}")
fi
read -ra inside <<<"${CONTAINER_COMMAND:-}"

listed() { local IFS=,; echo "$*"; } # WORDS...: with commas between
say() { echo "$(date +%T) $SLURM_JOB_NAME $SLURM_JOB_ID, life $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

once() { # COMMAND...: one process, on the first node, in the container
    srun --nodes=1 --ntasks=1 --nodelist="$head" "${container[@]}" "${inside[@]}" "$@"
}

# SLURM signals every process of a step.  The ranks save and leave at USR1 and TERM; torchrun must
# outlive both, and must not hand TERM on: to a rank a second signal means "leave at once".
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # torchrun --signals-to-handle, without TERM
# Without this, ranks that torchrun starts again meet the addresses of their dead predecessors.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

launch() { # SCRIPT ARGUMENTS...: all ranks, on the nodes of `nodes`
    if [ "${#nodes[@]}" = 1 ]; then # whose name it may not know itself
        rendezvous=localhost:${rendezvous##*:}
        export PET_LOCAL_ADDR=localhost # torchrun --local-addr
    fi
    say "${#nodes[@]} node(s) x $processes rank(s), rendezvous $rendezvous, logs $LOGS"
    srun --kill-on-bad-exit=1 --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
        --nodelist="$(listed "${nodes[@]}")" \
        "${container[@]}" "${inside[@]}" \
        bash -c 'trap "" USR1 TERM; eval "$SETUP"; exec torchrun --log-dir "$LOGS/$(hostname)" "$@"' \
        torchrun --nnodes="${#nodes[@]}" --nproc-per-node="$processes" \
        --rdzv-backend=c10d --rdzv-endpoint="$rendezvous" \
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --max-restarts="${MAX_RESTARTS:-3}" --tee=3 "$@"
}
