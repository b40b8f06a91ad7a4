#!/usr/bin/env bash
# Trains on all GPUs of this machine, one rank each:   scripts/launch_node.sh --config FILE --data FILES --out DIR [options of olmoe train]
# RANKS=N takes N ranks (without a GPU: processes that share the cores).
# Relative paths are looked up where it is called; the program is that of the script's own repository.
# On Ctrl-C and SIGTERM mpirun would kill its ranks. Here it gets SIGUSR1 instead, which it passes on to them: they
# finish the step, save, and all end with 0.
set -euo pipefail
olmoe=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")/olmoe
[ -x "$olmoe" ] || { echo "launch_node.sh: there is no $olmoe; make builds it" >&2; exit 1; }
ranks=${RANKS:-$({ nvidia-smi -L || true; } 2>/dev/null | wc -l)}
[ "$ranks" -gt 0 ] || { echo "launch_node.sh: no GPU found; RANKS=N starts N ranks" >&2; exit 1; }
root=(); [ "$(id -u)" -ne 0 ] || root=(--allow-run-as-root)
trap 'kill -USR1 $!' INT TERM HUP
setsid mpirun "${root[@]}" -np "$ranks" --oversubscribe --bind-to none "$olmoe" train "$@" &
code=0; wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done       # a signal ends the first wait
exit $code
