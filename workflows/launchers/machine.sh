#!/usr/bin/env bash
# A Dask cluster that stays up between runs (`nightslide run` alone starts one that ends with the run), on this machine
# or on several that share a folder, without a batch system:
#   workflows/launchers/machine.sh start scheduler.json      # scheduler and workers, until Ctrl-C
#   workflows/launchers/machine.sh join scheduler.json       # on further machines: workers only
#   nightslide run slides/ --out results --scheduler-file scheduler.json
# With TLS, a folder of certificates is the last argument of both (`run` needs its three files as --tls-...):
#   nightslide certificates --out tls
#   workflows/launchers/machine.sh start scheduler.json tls
# One worker process per GPU (CUDA_VISIBLE_DEVICES chooses) and up to six CPU workers per GPU that read, tile and outline,
# as many as there are cores; without a GPU, one process that computes on all cores. Without TLS, anyone who can reach the
# ports of scheduler and workers can run code there: use it on a trusted network only.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
usage="usage: machine.sh start|join FILE [CERTIFICATES]"
role=${1:?$usage} file=${2:?$usage} certificates=${3-}
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which would print those

if [ "${CUDA_VISIBLE_DEVICES+set}" ]; then # none, where it is empty or -1
    IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES#-1}"
else
    # where it fails, it says so on its standard output
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -x '[0-9]\+')
fi
cpu_workers=$((cores - ${#gpus[@]} < 6 * ${#gpus[@]} ? cores - ${#gpus[@]} : 6 * ${#gpus[@]}))
cpu_workers=$((cpu_workers < 1 ? 1 : cpu_workers))
processes=$((${#gpus[@]} + cpu_workers))
scheduler=(dask scheduler --scheduler-file "$file" --port 0)
share=$(LC_ALL=C awk "BEGIN { print 1 / $processes }") # some write 0,5 where that is the language's way, which Dask refuses
# a worker that is told to end while it starts would wait for the scheduler, which has ended, for ever
worker=(dask worker --scheduler-file "$file" --death-timeout 300 --memory-limit "$share")
if [ "$certificates" ]; then
    tls=(--tls-ca-file "$certificates/ca.pem" --tls-cert "$certificates/cert.pem" --tls-key "$certificates/key.pem")
    scheduler+=(--protocol tls "${tls[@]}")
    worker+=(--protocol tls "${tls[@]}")
fi

trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT
case $role in
    start)
        rm -f "$file"
        "${scheduler[@]}" &
        until [ -s "$file" ]; do
            kill -0 $! 2> /dev/null || { echo "machine.sh: the scheduler did not start" >&2 && exit 1; }
            sleep 0.2
        done
        ;;
    join) ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
if [ ${#gpus[@]} -eq 0 ]; then
    cpu_workers=$((cores < 4 ? cores : 4))
    # the allocator's variables, as Dask sets one of them otherwise, with which detection takes longer
    mapfile -t allocator < <(
        python -c 'from pipeline.model.allocator import ENVIRONMENT as e; print(*map("=".join, e.items()), sep="\n")'
    )
    env "${allocator[@]}" OMP_NUM_THREADS="$cores" "${worker[@]}" --nthreads $((2 + cpu_workers)) --resources "GPU=1 CPU=$cpu_workers" &
else
    for gpu in "${gpus[@]}"; do
        OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=$gpu "${worker[@]}" --nthreads 2 --resources GPU=1 &
    done
    OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "${worker[@]}" --nworkers "$cpu_workers" --nthreads 1 --resources CPU=1 &
fi
wait -n # when one process ends, the others are ended
