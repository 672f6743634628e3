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
# One archive, many jobs, no Dask cluster: each job runs the same command on the same --out and leases slides, one after
# another. Give arguments of nightslide run; options of sbatch come before the script.
#   sbatch --array=1-20 -p gpu workflows/launchers/slurm_array.sh slides/ --out results --stain macenko
# A job with no slide left ends at once, so that its GPU does not idle while other jobs finish. To do what a killed job
# left, and to bring ledger.csv and report.html up to date, submit one more that starts when all have ended (without
# --overwrite, which would do everything once more):
#   sbatch --array=1 --dependency=afterany:JOB workflows/launchers/slurm_array.sh slides/ --out results --stain macenko
# Other batch systems need only the command, any number of times, with SIGTERM before the time limit:
#   qsub -J 1-8 (PBS), bsub -J "nightslide[1-8]" (LSF), or, without any:
#   for host in a b c; do ssh "$host" "cd '$PWD' && nightslide run slides/ --out results" & done; wait
set -uo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac

nightslide run "$@" --no-wait &
run=$!
out_of_time=
trap 'out_of_time=yes; kill -TERM "$run"' USR1 # sent by --signal above, 180 s before the time limit
trap : TERM                                    # scancel signals nightslide, too: wait for it
while wait "$run"; status=$?; kill -0 "$run" 2> /dev/null; do :; done # a signal ends `wait` early

if [ "$out_of_time" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
