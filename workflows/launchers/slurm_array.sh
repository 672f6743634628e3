#!/usr/bin/env bash
#SBATCH --job-name=nightslide
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# One archive, many jobs, no Dask cluster between them: each runs the same command on the same --out, and leases the
# slides that it does. Give arguments of nightslide run; options of sbatch come before the script.
#   sbatch --array=1-20 -p gpu workflows/launchers/slurm_array.sh slides/ --out results --stain macenko
# A job with no slide left ends, rather than wait, on its GPU, for what others are at. So that what a dead job held
# is done too, and ledger.csv and report.html tell of all slides, hand in one more for when they have ended:
#   sbatch --array=1 --dependency=afterany:JOB workflows/launchers/slurm_array.sh slides/ --out results --stain macenko
# Other batch systems need only the command, as often as you like, with SIGTERM before the end:
#   qsub -J 1-8 (PBS), bsub -J "nightslide[1-8]" (LSF), or, without any:
#   for host in a b c; do ssh "$host" "cd $PWD && nightslide run slides/ --out results" & done; wait
set -uo pipefail

nightslide run "$@" --no-wait &
run=$!
out_of_time=
trap 'out_of_time=yes; kill -TERM "$run"' USR1 # by --signal above, while there is time to end well
trap : TERM                                    # scancel tells nightslide, too; wait for it
while wait "$run"; status=$?; kill -0 "$run" 2> /dev/null; do :; done # a signal ends `wait`, too

if [ "$out_of_time" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
