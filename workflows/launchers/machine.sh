#!/usr/bin/env bash
# A Dask cluster of this machine that outlives a run (`nightslide run` alone starts one that ends with it), or of
# several machines that share a folder, without a batch system:
#   workflows/launchers/machine.sh start scheduler.json      # scheduler and workers, until Ctrl-C
#   workflows/launchers/machine.sh join scheduler.json       # on further machines: workers only
#   nightslide run slides/ --out results --scheduler-file scheduler.json
# A worker process for every GPU (CUDA_VISIBLE_DEVICES chooses) and six beside it that read, tile and outline, as far as
# there are cores; without a GPU one process that computes on all cores. Whoever reaches the scheduler's port runs code
# on the workers: use it where you trust the network.
set -euo pipefail
usage="usage: machine.sh start|join FILE"
role=${1:?$usage} file=${2:?$usage}
cores=$(nproc)

if [ "${CUDA_VISIBLE_DEVICES-}" ]; then
    IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)
fi
beside=$((cores - ${#gpus[@]} < 6 * ${#gpus[@]} ? cores - ${#gpus[@]} : 6 * ${#gpus[@]}))
beside=$((beside < 1 ? 1 : beside))
processes=$((${#gpus[@]} + beside))
worker=(dask worker --scheduler-file "$file" --memory-limit "$(awk "BEGIN { print 1 / $processes }")")

trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT
case $role in
    start)
        rm -f "$file"
        dask scheduler --scheduler-file "$file" --port 0 &
        until [ -s "$file" ]; do sleep 0.2; done
        ;;
    join) ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
if [ ${#gpus[@]} -eq 0 ]; then
    beside=$((cores < 4 ? cores : 4))
    OMP_NUM_THREADS=$cores "${worker[@]}" --nthreads $((2 + beside)) --resources "GPU=1 CPU=$beside" &
else
    for gpu in "${gpus[@]}"; do
        OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=$gpu "${worker[@]}" --nthreads 2 --resources GPU=1 &
    done
    OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "${worker[@]}" --nworkers "$beside" --nthreads 1 --resources CPU=1 &
fi
wait -n # whichever ends first ends the others
