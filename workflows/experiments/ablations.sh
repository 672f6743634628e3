#!/usr/bin/env bash
# What each choice in the detector and its training brings: one short training from ImageNet for each, on 12 of the
# multi-organ set's 16 training images, all else equal; then the scores on the other four, each at the score threshold
# that is best for it, as a markdown table. Compare the rows with each other: such short trainings score low.
#   workflows/experiments/ablations.sh DATA OUT STEPS [flags of nightslide train]
# DATA: the folder of Kumar et al.'s images with its splits.json. CHOICES (environment) chooses some of the rows. A
# choice whose table is in OUT is skipped.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
here=$(dirname "$0")
usage="usage: ablations.sh DATA OUT STEPS [flags of nightslide train]"
data=${1:?$usage} out=${2:?$usage} steps=${3:?$usage}
shift 3
mkdir -p "$out"

flags() {
    case $1 in
    base) ;;
    upscale-1) echo --architecture.upscale 1 --architecture.anchors 12,20/29,43/61,88/127,180 ;;
    upscale-2) echo --architecture.upscale 2 --architecture.anchors 24,40/59,85/123,176/253,360 ;;
    one-anchor) echo --architecture.anchors 24/54/112/230 ;;
    mask-56) echo --architecture.mask-size 56 ;;
    default-mask-head) echo --architecture.mask-channels 256 --architecture.mask-layers 4 ;;
    no-semantic) echo --architecture.semantic 0 ;;
    no-augmentation) echo --strength 0 --gamma 0 --normalise 0 --rescan 0 --paste 0 ;;
    no-sizes) echo --shrink 0.75 --enlarge 1.35 ;;
    no-stains) echo --normalise 0 ;;
    no-rescan) echo --rescan 0 ;;
    no-paste) echo --paste 0 ;;
    lite2) echo --architecture.backbone tf_efficientnet_lite2 ;;
    *) echo "no choice '$1'" >&2 && return 2 ;;
    esac
}

choices="base upscale-1 upscale-2 one-anchor mask-56 default-mask-head no-semantic no-augmentation no-sizes no-stains
    no-rescan no-paste lite2"
for choice in ${CHOICES:-$choices}; do
    table=$out/$choice.md
    if [ ! -e "$table" ]; then
        extra=$(flags "$choice")
        # shellcheck disable=SC2086 # extra holds several flags
        nightslide train --data "$data" --split train --mpp 0.25 --out "$out/$choice" --steps "$steps" --hold-out 4 \
            --save-every "$steps" $extra "$@"
        python "$here/choose.py" --data "$data" --split train --mpp 0.25 --weights "$out/$choice/nuclei.safetensors" \
            >"$table.part"
        mv "$table.part" "$table"
    fi
done
grep -h -A 1 "^| NMS" "$table" | sed '1s/^|/| choice |/; 2s/^|/| --- |/'
for choice in ${CHOICES:-$choices}; do
    grep -F '**' "$out/$choice.md" | sed "s/^|/| $choice |/; s/\*\*//g"
done
