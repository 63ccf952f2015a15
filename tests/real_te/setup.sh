#!/usr/bin/env bash
# Transformer Engine's Python, without its libraries:  bash tests/real_te/setup.sh DIRECTORY
#
# The package of that name is Python alone (1 MB); what it is linked with (700 MB) and its extension,
# which has no wheel, are stubbed by the tests.
set -euo pipefail
directory=${1:?"usage: $0 DIRECTORY"}
package=transformer-engine==2.16.1
if [ "$(cat "$directory/.ready" 2>/dev/null)" = "$package" ]; then exit 0; fi
"${PYTHON:-python3}" -m pip install --quiet --no-deps --upgrade --target "$directory" "$package"
echo "$package" > "$directory/.ready"
