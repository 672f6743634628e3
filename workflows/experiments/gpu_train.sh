#!/usr/bin/env bash
# The trainings of the shipped weights on a GPU that is there for minutes: four at once, each from FROM, by the clock.
#   workflows/experiments/gpu_train.sh DATA OUT
# DATA: the folder of nuinsseg, tnbc, consep_train and dsb2018_tissue. OUT: a folder for each of nuclei, larger (crops of
# 256 px), classes and fast, with checkpoint, weights, losses and scores, and a log of each.
# Environment: MINUTES (5.7 of training; starting and the last scores take one more), FROM (nuclei), CORES (nproc).
# On an H200 with 16 cores a step of 32 crops took 0.51 s with all four at work, and each had 650 to 1,170 steps.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
usage="usage: gpu_train.sh DATA OUT"
data=$(realpath "${1:?$usage}") out=${2:?$usage} cores=${CORES:-$(nproc)}
mkdir -p "$out/consep_train"
for folder in images labels classes; do ln -sfn "$data/consep_train/$folder" "$out/consep_train/$folder"; done
cat >"$out/consep_train/dataset.json" <<'JSON'
{"classes": ["Other", "Inflammatory", "Healthy epithelial", "Malignant epithelial", "Fibroblast", "Muscle", "Endothelial"],
 "merge": {"Other": null, "Healthy epithelial": "Epithelial", "Malignant epithelial": "Neoplastic",
           "Fibroblast": "Connective", "Muscle": "Connective", "Endothelial": "Connective"}}
JSON
export OMP_NUM_THREADS=1

train() { # NAME SHARE_OF_CORES_IN_SIXTEENTHS [flags]
    local loaders=$((cores * $2 / 16))
    nightslide train --data "$data/nuinsseg" --mpp 0.16 --data "$data/tnbc" --mpp 0.25 \
        --data "$out/consep_train" --mpp 0.25 --data "$data/dsb2018_tissue" --mpp 0.25 --hold-out 2 \
        --init "${FROM:-nuclei}" --steps 0 --minutes "${MINUTES:-5.7}" --warmup 100 --save-every 900 \
        --loaders $((loaders > 1 ? loaders : 1)) --out "$out/$1" "${@:3}" >"$out/$1.log" 2>&1 ||
        echo "$1 failed: see $out/$1.log" >&2
}

train nuclei 5 --batch 32 --rate 1e-3 &
train larger 4 --batch 16 --rate 7e-4 --crop-px 256 --shrink 0.6 &
train classes 2 --batch 16 --rate 8e-4 --by-class &
train fast 2 --batch 32 --rate 1e-3 --crop-px 128 --shrink 0.7 --architecture.mpp 0.5 \
    --architecture.anchors 9,15/22,32/46,66/95,135 &
wait
tail -n 1 "$out"/*/scores.csv
