#!/usr/bin/env bash
# From a bare machine with an NVIDIA GPU to the acceptance's table, with a network or without one.
#
#   bash examples/h100/first_run.sh [--wheels DIR] [--python PYTHON] [--state DIR] [--dry-run] [-- ACCEPTANCE FLAGS]
#
# Each step prints its verdict and leaves DIR/STEP.done (default runs/first_run): started again, the
# script goes on behind the last one that passed; remove a stamp to do its step again.
# --wheels DIR: install from there alone (docs/gpu.md says how to fill it).  Transformer Engine is
# installed first where DIR has its wheels; else it is built once the acceptance has run without it.
set -uo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python3 wheels='' state=$repo/runs/first_run dry='' te_version=${TE_VERSION:-2.20.2}
usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
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
    say python "$(ask 'import platform; print(platform.python_version())'), torch $(torch_here || echo "with CUDA: none")"
    free=$(df -Pk "$state" | awk 'NR == 2 { printf "%d", $4 / 1048576 }')
    if [ "$free" -lt 20 ]; then verdict="$free GiB free at $state: need 20"; return 1; fi
    say disk "$free GiB free"
    # Triton builds at run time: its launchers are C that includes Python.h.
    if ! command -v cc >/dev/null || ! command -v c++ >/dev/null; then
        verdict="no C or C++ compiler, which triton needs at run time (apt-get install gcc g++)"; return 1
    fi
    say compiler "$(c++ --version | head -n 1)"
    if ! ask 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
        verdict="$python has no Python.h, which triton needs at run time (apt-get install python3-dev)"; return 1
    fi
    say headers "$(toolkit || echo "no CUDA toolkit: headers come from NVIDIA's Python packages")"
}
# The torch that the machine has, "version directory", where it is the pinned one or --wheels has no other.
pin=$(sed -n 's/^TORCH ?= //p' "$repo/Makefile")
torch_here() { ask 'import os, torch; assert torch.version.cuda; print(torch.__version__, os.path.dirname(os.path.dirname(torch.__file__)))'; }
uses_machine() {
    local here
    here=$(torch_here) || return 1
    here=${here%% *}
    [ "torch==${here%%+*}" = "$pin" ] || { [ -n "$wheels" ] && ! compgen -G "$wheels/torch-[0-9]*" >/dev/null; }
}
toolkit() { # the root of one with headers; nvcc alone may be a package's
    local nvcc root
    nvcc=$(readlink -f "$(command -v nvcc)" 2>/dev/null)
    for root in "${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda; do
        if [ -n "$root" ] && [ -e "$root/include/cuda_runtime_api.h" ]; then echo "$root"; return 0; fi
    done
    return 1
}

# An environment of its own, which finds the machine's packages where its torch is used: a .pth, as
# --system-site-packages would look past those of a machine's own environment.
environment() {
    local here
    run "$python" -m venv "$venv" || return 1
    if uses_machine; then
        here=$(torch_here)
        run "$venv/bin/python" -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/machine.pth", "w").write(sys.argv[1])' "${here#* }"
    fi
}
build_tools() { pip 'setuptools<82' wheel packaging; }
torch() { if uses_machine; then verdict="$(torch_here) of the machine (pinned: $pin)"; else pip "$pin"; fi; }
driver() { # torch's own words where the two do not fit
    [ -z "$dry" ] || { run "$venv/bin/python" -c 'import torch; torch.zeros(1, device="cuda")'; return 0; }
    verdict=$("$venv/bin/python" -c 'import torch; torch.zeros(1, device="cuda"); print("CUDA", torch.version.cuda)' 2>&1) && return 0
    verdict="torch cannot use the GPU ($(tail -n 1 <<<"$verdict")): update the driver, or pin another torch in the Makefile"
    return 1
}
product() { pip --no-build-isolation -e "$repo"; }

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
acceptance_all() { acceptance acceptance_all "$@"; }
acceptance_te() { acceptance acceptance_te "$@" --parts engine; }

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
    local home where='' arch
    # setup.py of the extension reads torch and these before pip knows what it needs.
    pip ninja pybind11 || return 1
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
    te_wheel
}
te_wheel() { # an extension that is ready, or what te_build has set up
    local major=13
    [ -n "$dry" ] || major=$(cuda_major)
    pip --no-build-isolation "transformer_engine[pytorch,core_cu$major]==$te_version"
}
# vLLM pins a torch of its own: an environment beside this one, whose program the acceptance finds.
vllm() {
    compgen -G "$wheels/vllm-*" >/dev/null || { verdict="no wheel of it in --wheels: its rows are skipped"; return 0; }
    run "$python" -m venv "$state/vllm" && run "$state/vllm/bin/python" -m pip install "${index[@]}" vllm "$repo"
}
te_import() { run "$venv/bin/python" -c 'import transformer_engine.pytorch'; }
# Half of it must not stay: megatron-core imports whatever is called transformer_engine.
te_remove() {
    [ -n "$dry" ] || rm -f "$state"/te_{wheel,build}.done
    run "$venv/bin/python" -m pip uninstall -y transformer_engine transformer_engine_torch transformer_engine_cu12 transformer_engine_cu13
}

step checks fatal
for name in environment build_tools torch driver product; do step "$name" fatal; done
step vllm optional
PATH=$PATH:$state/vllm/bin last=acceptance_all
if compgen -G "$wheels/transformer_engine_torch-*.whl" >/dev/null; then
    step te_wheel optional && step te_import optional || te_remove
    step acceptance_all optional "$@"
else
    step acceptance_all optional "$@"
    if step te_headers optional && step te_build optional && step te_import optional; then
        step acceptance_te optional "$@"
        last="acceptance_all acceptance_te"
    else
        te_remove
        say result "without Transformer Engine; its build's words are in $log"
    fi
fi
[ -n "$dry" ] || for name in $last; do echo; cat "$state/$name.txt" 2>/dev/null; done
