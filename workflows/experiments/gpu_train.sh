#!/usr/bin/env bash
# The long training of the default weights on a GPU that is there for minutes at a time: every call trains for one slice
# of nine minutes, writes its checkpoint, and the next call continues where it ended, on another machine too.
#   workflows/experiments/gpu_train.sh DATA OUT [flags of nightslide train, the same in every call]
# DATA: the folder of nuinsseg, tnbc, consep_train and dsb2018_tissue. OUT: checkpoint, weights, losses and scores.
# Environment: FROM (the OUT of the slice before, where that lies elsewhere; it is copied first), MINUTES (8.5 of training,
# so that start and last checkpoint fit into nine), STEPS (20000), BATCH (16), LOADERS (as many as cores, less one).
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
usage="usage: gpu_train.sh DATA OUT [flags of nightslide train]"
data=${1:?$usage} out=${2:?$usage}
shift 2
mkdir -p "$out"
if [ -n "${FROM-}" ] && [ ! -e "$out/checkpoint" ]; then
    cp -r "$FROM/." "$out"
    chmod -R u+w "$out"
fi
nightslide train --data "$data/nuinsseg" --mpp 0.16 --data "$data/tnbc" --mpp 0.25 --data "$data/consep_train" --mpp 0.25 \
    --data "$data/dsb2018_tissue" --mpp 0.25 --hold-out 2 --out "$out" --minutes "${MINUTES:-8.5}" \
    --steps "${STEPS:-20000}" --batch "${BATCH:-16}" --loaders "${LOADERS:-$(($(nproc) - 1))}" --save-every 500 "$@"
tail -n 1 "$out"/*.csv
