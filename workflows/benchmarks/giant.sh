#!/usr/bin/env bash
# Memory and scratch space stay bounded however large the slide: one replicated to 44,400 x 44,505 px, segmented with a
# tiny detector by two worker processes, of which one detects, while their memory is sampled from outside.
#   workflows/benchmarks/giant.sh SLIDE TNBC WORK [flags of nightslide run]
# SLIDE: CMU-1-Small-Region.svs. TNBC: the dataset that the tiny detector is trained on, in a minute; its detections are
# right in number and size only. WORK: a folder for everything; its giant.tif and tiny.safetensors are reused.
# ACROSS and DOWN (environment): how often the slide is repeated.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
here=$(dirname "$0")
usage="usage: giant.sh SLIDE TNBC WORK [flags of nightslide run]"
slide=${1:?$usage} tnbc=${2:?$usage} work=${3:?$usage}
shift 3
mkdir -p "$work"

if [ ! -e "$work/giant.tif" ]; then
    python "$here/replicate.py" "$slide" "$work/giant.tif" --across "${ACROSS:-20}" --down "${DOWN:-15}"
fi
if [ ! -e "$work/tiny.safetensors" ]; then
    nightslide train --data "$tnbc" --mpp 0.25 --out "$work/training" --init random --steps 300 --warmup 30 \
        --batch 2 --crop-px 128 --rate 2e-3 --average 0.98 --save-every 300 \
        --architecture.backbone test_efficientnet --architecture.mpp 0.5 --architecture.upscale 1 \
        --architecture.channels 32 --architecture.semantic 16 --architecture.box-hidden 64 \
        --architecture.mask-channels 16 --architecture.mask-layers 1 --architecture.mask-size 14
    mv "$work/training/nuclei.safetensors" "$work/tiny.safetensors"
fi

results=$work/results-$(date +%Y%m%d-%H%M%S)
python "$here/watch.py" --tsv "$results.tsv" --folder "$results/**/work" --folder "$results" -- \
    nightslide run "$work/giant.tif" --out "$results" --weights "$work/tiny.safetensors" \
    --tiling.mpp 0.5 --detector.score 0.5 --detector.proposals-per-mm2 16000 --workers 1 "$@"
