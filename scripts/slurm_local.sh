#!/usr/bin/env bash
# A Slurm cluster of one node: this machine. For the tests marked `slurm`, and to try hydra/launcher=slurm.
#   eval "$(scripts/slurm_local.sh up [folder])"    start it; its state lies in the folder, .slurm by default
#   scripts/slurm_local.sh down [folder]            stop it, with its jobs, and remove the folder
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

stop() {
    local daemon file pid
    for daemon in slurmctld slurmd munged; do
        file=$folder/$daemon.pid
        alive "$file" || continue
        pid=$(<"$file")
        kill "$pid"
        for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}

start() {
    local host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$folder"/{state,spool}
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" >&2
    slurmctld -f "$folder/slurm.conf" >&2
    slurmd -f "$folder/slurm.conf" >&2
    for _ in {1..60}; do
        [[ $(SLURM_CONF=$folder/slurm.conf sinfo -h -o %T 2>/dev/null) == idle ]] && return
        sleep 0.5
    done
    tail -n 3 "$folder"/*.log >&2
    stop
    fail "the cluster did not start; the ends of its logs are above"
}

folder=$(realpath -m "${2:-$(dirname "$0")/../.slurm}")
case ${1:-} in
    up)
        for program in munged slurmctld slurmd sbatch; do
            PATH=$PATH:/usr/sbin command -v "$program" >/dev/null ||
                fail "$program is not found; on Debian, apt-get install slurm-wlm munge"
        done
        PATH=$PATH:/usr/sbin
        alive "$folder/slurmctld.pid" || { stop; start; }
        echo "export SLURM_CONF=$folder/slurm.conf"
        ;;
    down)
        stop
        ;;
    *)
        fail "usage: $0 up|down [folder]"
        ;;
esac
