#!/usr/bin/env bash
# with_chromium.sh COMMAND...: run it where a Chromium is or can be installed; elsewhere say why not.
set -euo pipefail
skip() { echo "browser tests not run: $*"; exit 0; }
if ! command -v chromium >/dev/null; then
    [ "$(id -u)" = 0 ] || skip "no chromium, and only root can install it"
    command -v apt-get >/dev/null || skip "no chromium, and no apt-get to install it with"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -q update && apt-get -q install -y --no-install-recommends chromium; } \
        >/dev/null || skip "apt-get could not install chromium"
fi
exec "$@"
