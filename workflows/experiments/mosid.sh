#!/usr/bin/env bash
# Multi-organ set of Jung et al. 2019: stain normalisation x views on the 14 test images, as markdown tables,
# all images and those of organs seen and not seen in training apart.
#   workflows/experiments/mosid.sh [--quick] DATA OUT [flags of nightslide evaluate, such as --weights FILE]
# DATA: the folder of Kumar et al.'s images with its splits.json. OUT: a folder for one weights file; a setting whose
# JSON it holds is skipped. --quick: one view only. STAINS and VIEWS (environment) choose others.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
here=$(dirname "$0")
views=${VIEWS:-1 4 8}
if [ "${1:-}" = --quick ]; then
    views=1
    shift
fi
data=${1:?"usage: mosid.sh [--quick] DATA OUT [flags of nightslide evaluate]"}
out=${2:?"usage: mosid.sh [--quick] DATA OUT [flags of nightslide evaluate]"}
shift 2
mkdir -p "$out"
for stain in ${STAINS:-none macenko dcgmm}; do
    for view in $views; do
        json=$out/$stain-$view.json
        if [ -e "$json" ]; then
            continue
        fi
        nightslide evaluate --data "$data" --split test_same_organ --split test_different_organ --mpp 0.25 \
            --stain "$stain" --views "$view" --json "$json" "$@"
    done
done
python "$here/tables.py" "$out"
