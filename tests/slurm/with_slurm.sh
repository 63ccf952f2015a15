#!/usr/bin/env bash
# with_slurm.sh COMMAND...: run it where a local SLURM cluster can be had; elsewhere say why not.
# Debian's packages are installed where root and apt-get are there; no service is started.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2 util-linux hostname)
skip() { echo "SLURM tests not run: $*"; exit 0; }
missing() { # one program at a time: `command -v a b` is content with either
    local program
    for program in slurmctld slurmd sbatch munged ip nsenter hostname; do
        command -v "$program" >/dev/null || echo -n " $program"
    done
}
PATH=$PATH:/usr/sbin:/sbin
[ "$(id -u)" = 0 ] || skip "they need root, for network namespaces"
unshare --net --uts true 2>/dev/null || skip "this machine allows no network namespaces"
if [ -n "$(missing)" ]; then
    command -v apt-get >/dev/null || skip "no$(missing), and no apt-get to install ${packages[*]} with"
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # 1: packages start no services
    { apt-get -q update && apt-get -q install -y --no-install-recommends "${packages[@]}"; } \
        >/dev/null || skip "apt-get could not install ${packages[*]}"
    [ -z "$(missing)" ] || skip "apt-get installed ${packages[*]}, which did not bring$(missing)"
fi
exec "$@"
