#!/usr/bin/env bash
# bash runs up to `exec` and so re-launches this file through torchrun, which starts it with Python.
# For Python bash's part is a string (to bash, the ''':' that opens it is the no-op `:`); for bash
# Python's part is a here-document, whose last line is a comment to Python.
''':'
repo=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repo/.venv/bin/python" ]; then PATH="$repo/.venv/bin:$PATH"; fi
# A checkout's package, installed or not; a copy of this file elsewhere takes the installed one.
if [ -d "$repo/megatron_phf" ]; then export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"; fi
# A random.py in the working directory is not Python's: modules of your own are looked for there last.
export PYTHONSAFEPATH=1
for argument in "$@"; do
    case $argument in -h | --help) exec python3 -m megatron_phf.config.flags "$@" ;; esac
done
counts=$(python3 -m megatron_phf.cli.preflight "$@") || exit $?
read -r processes threads <<<"$counts"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
# --local-addr: the machine's own name may be unknown to it (containers, a laptop on a VPN).
exec torchrun --standalone --local-addr localhost --nproc-per-node "$processes" "${BASH_SOURCE[0]}" "$@"
: <<'# the end of the part in Python'
'''
import sys
from pathlib import Path

repo = Path(__file__).resolve().parent.parent
if (repo / "megatron_phf").is_dir():  # torchrun looks beside this file only
    sys.path.insert(0, str(repo))

from megatron_phf.cli.main import main

if __name__ == "__main__":
    main()
# the end of the part in Python
