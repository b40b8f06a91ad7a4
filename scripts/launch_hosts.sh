#!/usr/bin/env bash
# Trains on several machines by mpirun:   scripts/launch_hosts.sh HOSTFILE --config FILE --data FILES --out DIR [options of olmoe train]
# HOSTFILE has a line for each machine: its name and "slots=" its number of GPUs. On all machines, the repository, the
# folder where this is called (relative paths are looked up there), the data and --out have the same paths. Ctrl-C and
# SIGTERM save, as in launch_node.sh.
set -euo pipefail
olmoe=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")/olmoe
[ $# -gt 1 ] && [ -r "$1" ] || { echo "launch_hosts.sh HOSTFILE --config FILE --data FILES --out DIR ...: a readable HOSTFILE comes first" >&2; exit 1; }
[ -x "$olmoe" ] || { echo "launch_hosts.sh: there is no $olmoe; make builds it" >&2; exit 1; }
hosts=$1; shift
root=(); [ "$(id -u)" -ne 0 ] || root=(--allow-run-as-root)
trap 'kill -USR1 $!' INT TERM HUP
setsid mpirun "${root[@]}" --hostfile "$hosts" --map-by slot --bind-to none --wdir "$PWD" "$olmoe" train "$@" &
code=0; wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done
exit $code
