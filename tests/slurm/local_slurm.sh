#!/usr/bin/env bash
# A real two-node SLURM cluster on one machine, for tests.  Root, no systemd, no cgroups.
#
#   local_slurm.sh start DIR      write the configuration under DIR, start, wait for 2 idle nodes
#   local_slurm.sh stop  DIR      cancel the jobs, stop exactly what start started
#   local_slurm.sh status DIR     0 when all four daemons run
#   local_slurm.sh kill DIR NODE  SIGKILL the node's slurmd and all that its jobs run there
#   local_slurm.sh boot DIR NODE  start that node's slurmd again
#   eval "$(local_slurm.sh env DIR)"   PATH and SLURM_CONF for the caller (sbatch, squeue, ...)
#
# The cluster lives in a network namespace of its own that has loopback only, so neither the
# daemons nor what jobs start (torchrun's TCPStore binds every address) can listen on, or reach,
# anything but this machine; its ports collide with nobody's.  The client commands in DIR/bin
# enter that namespace.  Each slurmd has its own UTS namespace, so inside a job `hostname` says n1
# or n2, and a private /etc/hosts resolves n1 and n2 to different loopback addresses.
#
# Needs: slurmctld slurmd slurm-client munge (apt), unshare and nsenter (util-linux), ip (iproute2).
# Settings (environment): LOCAL_SLURM_CPUS (per node, 4), LOCAL_SLURM_GPUS (pretended per node, 0),
# LOCAL_SLURM_KILLWAIT (TERM to KILL, 30 s), LOCAL_SLURM_WAIT (start's patience, 60 s).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
NODES=(n1 n2)
MARK='# a client of local_slurm.sh'
CLIENTS=(sbatch srun salloc squeue scancel scontrol sinfo sattach sstat)

die() { echo "local_slurm: $*" >&2; exit 1; }

started() { # PID -> its start time in clock ticks; guards against a reused pid
    [ -r "/proc/$1/stat" ] || return 1
    local s; s=$(<"/proc/$1/stat") 2>/dev/null || return 1
    s=${s##*) }
    set -- $s
    [ "$1" != Z ] || return 1
    echo "${20}"
}
remember() { echo "$2 $(started "$2")" >"$RUN/$1.started"; }
alive() { # NAME -> 0 and PID on stdout when the process start recorded still runs
    local pid t now
    [ -r "$RUN/$1.started" ] || return 1
    read -r pid t <"$RUN/$1.started" || return 1
    now=$(started "$pid") || return 1
    [ "$now" = "$t" ] || return 1
    echo "$pid"
}
all_alive() {
    local n
    for n in ns munged slurmctld "${NODES[@]/#/slurmd.}"; do alive "$n" >/dev/null || return 1; done
}
spawn() { # NAME COMMAND... ; every command execs, so $! is the daemon itself
    local name=$1; shift
    setsid "$@" </dev/null >>"$LOG/$name.out" 2>&1 &
    remember "$name" $!
}
wait_for() { # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}
client() { "$DIR/bin/$1" "${@:2}"; }
nodes_idle() { [ "$(client sinfo -h -N -o '%N %t' | sort -u | grep -c ' idle$')" = ${#NODES[@]} ]; }

write_files() {
    local i name host gres='' cpus=${LOCAL_SLURM_CPUS:-4} gpus=${LOCAL_SLURM_GPUS:-0}
    host=$(hostname -s)
    local mem; mem=$(awk '/^MemTotal/{print int($2/1024)}' /proc/meminfo)
    mkdir -p "$RUN" "$LOG" "$DIR/state" "$DIR/spool" "$DIR/bin"
    chmod 755 "$DIR" "$RUN" "$LOG"
    [ -s "$DIR/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$DIR/munge.key")
    chmod 600 "$DIR/munge.key"
    # ::ffff: lines: TCPStore looks its peers' names up by their mapped addresses, and warns without.
    printf '127.0.0.1 localhost %s\n::ffff:127.0.0.1 mapped-localhost\n' "$host" >"$DIR/hosts"
    [ "$gpus" = 0 ] || gres="Gres=gpu:$gpus"
    {
        cat <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$SOCK,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
MailProg=$(command -v true)
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=5
ReturnToService=2
SlurmdTimeout=60
KillWait=${LOCAL_SLURM_KILLWAIT:-30}
MinJobAge=3600
CONF
        [ "$gpus" = 0 ] || echo GresTypes=gpu
        for i in "${!NODES[@]}"; do
            name=${NODES[i]}
            echo "NodeName=$name NodeHostname=$name NodeAddr=127.0.1.$((i + 1)) Port=$((17001 + i))" \
                 "CPUs=$cpus RealMemory=$mem $gres State=UNKNOWN"
            printf '127.0.1.%d %s\n::ffff:127.0.1.%d mapped-%s\n' \
                $((i + 1)) "$name" $((i + 1)) "$name" >>"$DIR/hosts"
        done
        echo "PartitionName=debug Nodes=$(IFS=,; echo "${NODES[*]}") Default=YES MaxTime=INFINITE State=UP"
    } >"$CONF"
    rm -f "$DIR/gres.conf"
    if [ "$gpus" != 0 ]; then # gres/gpu counts files, and any files will do without cgroups
        mkdir -p "$DIR/dev"
        for ((i = 0; i < gpus; i++)); do : >"$DIR/dev/nvidia$i"; done
        echo "AutoDetect=off
Name=gpu File=$DIR/dev/nvidia[0-$((gpus - 1))]" >"$DIR/gres.conf"
    fi
    local c path
    for c in "${CLIENTS[@]}"; do
        # The caller's PATH may begin with a cluster's wrappers, this one's or another's: pass them by.
        path=$(type -ap "$c" | while read -r path; do
            [ "$(sed -n 2p "$path" | tr -d '\0')" = "$MARK" ] || { echo "$path"; break; }
        done 2>/dev/null)
        [ -n "$path" ] || continue
        cat >"$DIR/bin/$c" <<CMD
#!/bin/sh
$MARK
read -r pid _ <'$RUN/ns.started' || exit 1
SLURM_CONF='$CONF' exec nsenter --net="/proc/\$pid/ns/net" '$path' "\$@"
CMD
        chmod 755 "$DIR/bin/$c"
    done
}

start() {
    local c ns inside n
    if all_alive && nodes_idle; then echo "local_slurm: already running in $DIR"; return; fi
    [ "$(id -u)" = 0 ] || die "needs root"
    for c in munged slurmctld slurmd sbatch unshare nsenter ip hostname; do
        command -v "$c" >/dev/null || die "needs $c (apt-get install slurmctld slurmd slurm-client munge)"
    done
    [ ${#SOCK} -le 100 ] || die "DIR is too long for a Unix socket's path: $DIR"
    mkdir -p "$DIR"
    [ ! -d "$RUN" ] || stop
    write_files
    # The holder of the namespaces; it does nothing else.  The second address on lo is needed: SLURM
    # resolves with AI_ADDRCONFIG, and where 127.0.0.1 is the only address, glibc then resolves
    # nothing, not even a numeric address.
    spawn ns unshare --net --mount --propagation slave \
        sh -c 'ip link set lo up && ip addr add 127.0.1.1/32 dev lo && mount --bind "$1" /etc/hosts &&
               : >"$2" && exec sleep infinity' sh "$DIR/hosts" "$RUN/ns.ready"
    wait_for 10 test -e "$RUN/ns.ready" || { stop; die "no namespaces; see $LOG/ns.out"; }
    ns=$(alive ns) || die "the namespaces' holder ended; see $LOG/ns.out"
    inside=(nsenter --net="/proc/$ns/ns/net" --mount="/proc/$ns/ns/mnt")
    spawn munged "${inside[@]}" munged -F --key-file="$DIR/munge.key" --socket="$SOCK" \
        --pid-file="$RUN/munged.pid" --log-file="$LOG/munged.log" --seed-file="$RUN/munged.seed"
    wait_for 10 test -S "$SOCK" || { cat "$LOG/munged.out" >&2; stop; die "munged did not start"; }
    spawn slurmctld "${inside[@]}" slurmctld -D -c -f "$CONF"
    for n in "${NODES[@]}"; do boot "$n"; done
    if ! wait_for "${LOCAL_SLURM_WAIT:-60}" nodes_idle || ! all_alive; then
        client sinfo -N -l >&2 || true
        for n in "$LOG"/*; do echo "==> $n"; tail -n 8 "$n"; done >&2 || true
        stop
        die "no ${#NODES[@]} idle nodes after ${LOCAL_SLURM_WAIT:-60} s; logs in $LOG"
    fi
    client sinfo
}

boot() { # NODE
    local ns; ns=$(alive ns) || die "no cluster runs in $DIR"
    spawn "slurmd.$1" nsenter --net="/proc/$ns/ns/net" --mount="/proc/$ns/ns/mnt" unshare --uts \
        sh -c 'hostname "$1" && exec slurmd -D -N "$1" -f "$2"' sh "$1" "$CONF"
}

kill_node() { # NODE: as a power cut would
    local pid uts p
    pid=$(alive "slurmd.$1") || die "$1 does not run"
    uts=$(readlink "/proc/$pid/ns/uts")
    [ "$uts" != "$(readlink /proc/self/ns/uts)" ] || die "$1 has no UTS namespace of its own"
    for p in $(inhabitants uts "$uts"); do kill -KILL "$p" 2>/dev/null || true; done
    rm -f "$RUN/slurmd.$1.started"
}

inhabitants() { # KIND NS-LINK -> pids of every process in that namespace, all looked at by one find
    local link=${2//[/\\[}
    { find /proc/[0-9]*/ns/"$1" -maxdepth 0 -lname "${link//]/\\]}" 2>/dev/null || true; } | cut -d/ -f3
}
no_inhabitants() { [ -z "$(inhabitants net "$1" | grep -vx "$2")" ]; }
no_jobs() { [ -z "$(client squeue -h)" ]; }
gone() { ! alive "$1" >/dev/null; }

end_one() { # NAME: TERM, then KILL after 10 s
    local pid
    pid=$(alive "$1") && kill -TERM "$pid" 2>/dev/null || true
    wait_for 10 gone "$1" || { pid=$(alive "$1") && kill -KILL "$pid" 2>/dev/null || true; }
    rm -f "$RUN/$1.started"
}

stop() {
    local n ns link p
    [ -d "$RUN" ] || return 0
    if alive ns >/dev/null && alive slurmctld >/dev/null; then
        timeout 10 "$DIR/bin/scancel" --state=PENDING,RUNNING,SUSPENDED >/dev/null 2>&1 || true
        for n in $(timeout 10 "$DIR/bin/squeue" -h -o %A 2>/dev/null || true); do
            timeout 10 "$DIR/bin/scancel" "$n" >/dev/null 2>&1 || true
        done
        wait_for $((${LOCAL_SLURM_KILLWAIT:-30} + 10)) no_jobs || true
    fi
    for n in "${NODES[@]/#/slurmd.}" slurmctld munged; do end_one "$n"; done
    # What is left in our network namespace (a slurmstepd, a job's orphan) came from this cluster.
    if ns=$(alive ns); then
        link=$(readlink "/proc/$ns/ns/net" || true)
        if [ -n "$link" ] && [ "$link" != "$(readlink /proc/self/ns/net)" ]; then
            for p in $(inhabitants net "$link" | grep -vx "$ns" || true); do kill -TERM "$p" 2>/dev/null || true; done
            wait_for 5 no_inhabitants "$link" "$ns" ||
                for p in $(inhabitants net "$link" | grep -vx "$ns" || true); do kill -KILL "$p" 2>/dev/null || true; done
        fi
    fi
    end_one ns
    rm -rf "$RUN"
}

usage="usage: $0 start|stop|status|env DIR, or kill|boot DIR NODE"
[ $# -ge 2 ] || die "$usage"
DIR=$(realpath -m -- "$2")
case $DIR in *[\'\ \#\%]*) die "DIR may not contain blanks, quotes, # or %: $DIR" ;; esac
RUN=$DIR/run LOG=$DIR/log CONF=$DIR/slurm.conf SOCK=$DIR/run/munge.socket
case $1 in
    start | stop) "$1" ;;
    status) all_alive && client sinfo ;;
    env) printf "export SLURM_CONF='%s'\nexport PATH='%s':\"\$PATH\"\n" "$CONF" "$DIR/bin" ;;
    kill) kill_node "${3:?"$usage"}" ;;
    boot) boot "${3:?"$usage"}" ;;
    *) die "$usage" ;;
esac
