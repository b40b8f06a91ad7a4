#!/usr/bin/env bash
# Trains on several nodes under Slurm:   sbatch -N 32 scripts/launch_slurm.sh --config FILE --data FILES --out DIR [options of olmoe train]
# One task a GPU. Before the time limit, or when it preempts, Slurm sends SIGTERM; the ranks finish the step, save and
# end with 0. The same sbatch line then continues the run, because --resume is given here. Relative paths are looked up
# where sbatch is called, or in its --chdir.
#SBATCH --job-name=olmoe
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
# sbatch runs a copy of this script. Where the script itself is, in the repository with the program, Slurm has recorded.
script=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's|^ *Command=\(.*/launch_slurm\.sh\)\( .*\)\{0,1\}$|\1|p') || true
olmoe=$(dirname -- "$(dirname -- "$(readlink -f -- "${script:-$0}")")")/olmoe
[ -x "$olmoe" ] || olmoe=./olmoe
[ -x "$olmoe" ] || { echo "launch_slurm.sh: there is no olmoe in the repository of this script or in $PWD; make builds it" >&2; exit 1; }
if srun --mpi=list 2>&1 | grep -q pmix; then
    exec srun --mpi=pmix --kill-on-bad-exit=1 "$olmoe" train --resume "$@"
fi
# Slurm without PMIx: the ranks meet at the first node
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 "$olmoe" train --resume --rendezvous "$first:$(( 20000 + SLURM_JOB_ID % 20000 ))" "$@"
