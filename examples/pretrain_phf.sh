#!/usr/bin/env bash
# bash runs up to `exec` and so re-launches this file through torchrun; for Python, which torchrun
# starts it with, that block is a string (''' opens and closes it; to bash ''':' is the no-op `:`).
''':'
cd_to_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$cd_to_repo/.venv/bin/python" ]; then
    PATH="$cd_to_repo/.venv/bin:$PATH"
fi
for argument in "$@"; do
    case $argument in -h | --help) exec python3 -m megatron_phf.flags "$@" ;; esac
done
counts=$(python3 -m megatron_phf.preflight "$@") || exit $?
read -r processes threads <<<"$counts"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
exec torchrun --standalone --nproc-per-node "$processes" "${BASH_SOURCE[0]}" "$@"
'''
from megatron_phf.main import main

if __name__ == "__main__":
    main()
