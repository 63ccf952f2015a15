#!/usr/bin/env bash
# From a bare machine with an NVIDIA GPU to the acceptance's table, with a network or without one.
#
#   bash examples/h100/first_run.sh [--wheels DIR] [--python PYTHON] [--state DIR] [--dry-run] [-- ACCEPTANCE FLAGS]
#
# Each step prints its verdict and leaves DIR/STEP.done (default runs/first_run): started again, the
# script goes on behind the last one that passed; remove a stamp to do its step again.  What needs
# Transformer Engine comes last, and its failure stops nothing: the acceptance has run without by then.
# --wheels DIR: install from there alone (docs/gpu.md says how to fill it).
set -uo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python3 wheels='' state=$repo/runs/first_run dry='' te_version=${TE_VERSION:-2.20.2}
usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
while [ $# -gt 0 ]; do
    case $1 in
        --wheels | --python | --state)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case $1 in --wheels) wheels=$2 ;; --python) python=$2 ;; --state) state=$2 ;; esac
            shift 2 ;;
        --dry-run) dry=1; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        *) echo "error: $1: unknown (--help)" >&2; exit 2 ;;
    esac
done
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then echo "error: --wheels $wheels: no such directory" >&2; exit 2; fi
mkdir -p "$state" || exit 2
venv=$state/venv log=$state/log
index=()
[ -n "$wheels" ] && index=(--no-index --find-links "$wheels")

say() { printf '%-12s %s\n' "$1" "$2"; }
run() { # a command, or in a dry run its words
    if [ -n "$dry" ]; then echo "             $*"; else "$@" >>"$log" 2>&1; fi
}
ask() { "$python" -c "$1" 2>/dev/null; } # of the Python that the environment is made from
pip() { run env "${build[@]}" "$venv/bin/python" -m pip install ${index[@]+"${index[@]}"} "$@"; }
build=(PIP_DISABLE_PIP_VERSION_CHECK=1)

# step NAME FATAL? FUNCTION: once; what went wrong is the end of the log.
step() {
    local name=$1 fatal=$2
    if [ -e "$state/$name.done" ]; then say "$name" "done before"; return 0; fi
    if "$name" "${@:3}"; then
        [ -n "$dry" ] || touch "$state/$name.done"
        say "$name" "${verdict:-ok}"; verdict=''; return 0
    fi
    say "$name" "FAILED: ${verdict:-see $log}"
    [ -n "${verdict:-}" ] || [ ! -e "$log" ] || tail -n 5 "$log" | sed 's/^/             /'
    verdict=''
    [ "$fatal" = optional ] || exit 1
    return 1
}

checks() {
    local gpu free
    if ! gpu=$(nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader 2>/dev/null) || [ -z "$gpu" ]; then
        verdict="no GPU: nvidia-smi is missing or finds none; install NVIDIA's driver"; return 1
    fi
    say gpu "$(head -n 1 <<<"$gpu") ($(wc -l <<<"$gpu") of them)"
    if ! ask 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; then
        verdict="$python: need Python 3.11 or newer with venv (Debian, Ubuntu: apt-get install python3-venv), or --python"
        return 1
    fi
    say python "$(ask 'import platform; print(platform.python_version())'), $(torch_here || echo 'no torch with CUDA: it is installed')"
    free=$(df -Pk "$state" | awk 'NR == 2 { printf "%d", $4 / 1048576 }')
    if [ "$free" -lt 20 ]; then verdict="$free GiB free at $state: need 20"; return 1; fi
    say disk "$free GiB free (a checkpoint of the large model wants 30 more under TMPDIR)"
    if command -v c++ >/dev/null; then
        say compiler "$(c++ --version | head -n 1)"
    else
        say compiler "no c++: Transformer Engine cannot be built (apt-get install g++)"
    fi
    say headers "$(toolkit || echo "no CUDA toolkit: headers come from NVIDIA's Python packages")"
}
torch_here() { ask 'import torch; assert torch.version.cuda; print("torch", torch.__version__)'; }
toolkit() { # the root of one with headers; nvcc alone may be a package's
    local nvcc root
    nvcc=$(readlink -f "$(command -v nvcc)" 2>/dev/null)
    for root in "${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda; do
        if [ -n "$root" ] && [ -e "$root/include/cuda_runtime_api.h" ]; then echo "$root"; return 0; fi
    done
    return 1
}

# An environment of its own; a torch with CUDA that the machine has already is used from there.
environment() {
    local options=()
    if torch_here >/dev/null; then options=(--system-site-packages); fi
    run "$python" -m venv ${options[@]+"${options[@]}"} "$venv"
}
# setup.py of Transformer Engine's extension reads torch and these before pip knows what it needs.
build_tools() { pip 'setuptools<82' wheel packaging ninja pybind11; }
torch() { if torch_here >/dev/null; then verdict="of the machine"; else pip torch; fi; }
product() { pip --no-build-isolation -e "$repo[test]"; }

acceptance() { # NAME FLAGS...
    local report=$state/$1.json
    if [ -n "$dry" ]; then run "$venv/bin/python" "$repo/tools/acceptance.py" --json "$report" "${@:2}"; return 0; fi
    "$venv/bin/python" "$repo/tools/acceptance.py" --json "$report" "${@:2}" >"$state/$1.txt" 2>>"$log"
    case $? in
        0) verdict="all rows pass: $state/$1.txt" ;;
        1) verdict="some rows fail: $state/$1.txt" ;;
        *) return 1 ;;
    esac
}
acceptance_local() { acceptance acceptance_local "$@"; }
acceptance_te() { acceptance acceptance_te "$@"; }

cuda_major() { "$venv/bin/python" -c 'import torch; print(torch.version.cuda.split(".")[0])' 2>/dev/null || echo 13; }
# cuDNN's and NCCL's headers are in nvidia/*/include of torch's own packages; without a toolkit
# CUDA's are fetched, too.
te_headers() {
    if toolkit >/dev/null; then verdict="of $(toolkit)"; return 0; fi
    case $(cuda_major) in
        12) pip --no-deps nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12 nvidia-cuda-nvcc-cu12 ;;
        *) pip --no-deps 'nvidia-cuda-runtime<14' 'nvidia-cuda-cccl<14' 'nvidia-cuda-crt<14' ;;
    esac
}
te_build() {
    local home major=13 where='' arch
    command -v c++ >/dev/null || { verdict="no c++ (apt-get install g++)"; return 1; }
    [ -n "$dry" ] || major=$(cuda_major)
    where=$("$venv/bin/python" -c '
import glob, sys
found = [d for p in sys.path for d in glob.glob(p + "/nvidia/*/include")]
print(":".join(dict.fromkeys(found)))' 2>/dev/null)
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
    # Without FORCE_BUILD a ready wheel is looked for on the network; CPATH serves every version.
    build+=(NVTE_FRAMEWORK=pytorch "NVTE_CUDA_ARCHS=$arch" NVTE_PYTORCH_FORCE_BUILD=TRUE)
    build+=("MAX_JOBS=$(env -u OMP_NUM_THREADS nproc)")
    [ -z "$where" ] || build+=("CPATH=$where${CPATH:+:$CPATH}")
    for home in ${where//:/ }; do [[ $home == */cudnn/include ]] && build+=("CUDNN_PATH=${home%/include}"); done
    if toolkit >/dev/null; then build+=("CUDA_HOME=$(toolkit)"); else build+=(NVTE_BUILD_USE_NVIDIA_WHEELS=1); fi
    pip --no-build-isolation "transformer_engine[pytorch,core_cu$major]==$te_version"
}
te_import() { run "$venv/bin/python" -c 'import transformer_engine.pytorch'; }
# Half of it must not stay: megatron-core imports whatever is called transformer_engine.
te_remove() {
    [ -n "$dry" ] || rm -f "$state/te_build.done"
    run "$venv/bin/python" -m pip uninstall -y transformer_engine transformer_engine_torch transformer_engine_cu12 transformer_engine_cu13
}

step checks fatal
step environment fatal
step build_tools fatal
step torch fatal
step product fatal
step acceptance_local optional "$@"
if step te_headers optional && step te_build optional && step te_import optional; then
    step acceptance_te optional "$@"
    last=acceptance_te
else
    te_remove
    say result "without Transformer Engine; its build's words are in $log"
    last=acceptance_local
fi
[ -n "$dry" ] || { echo; cat "$state/$last.txt" 2>/dev/null; }
