#!/usr/bin/env bash
# Single-organ set (BNS) of Jung et al. 2019, leave one patient out: for each of the 7 patients a short training on
# the others, then the scores of what was left out; a row per patient and their image mean, as a markdown table.
#   workflows/experiments/bns.sh DATA OUT MINUTES [flags of nightslide train, such as --init FILE]
# DATA: the TNBC folder with its splits.json. --init must not have seen these patients. PATIENTS (environment)
# chooses some of them; EVALUATE holds flags of nightslide evaluate; MEAN_WITH is a weights file, the one of --init, of which
# and, twice, each training the mean is scored. A patient whose JSON is in OUT is skipped.
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
here=$(dirname "$0")
usage="usage: bns.sh DATA OUT MINUTES [flags of nightslide train]"
data=${1:?$usage} out=${2:?$usage} minutes=${3:?$usage}
shift 3
mkdir -p "$out"
for patient in ${PATIENTS:-01 02 03 04 05 06 07}; do
    json=$out/patient-$patient.json
    if [ -e "$json" ]; then
        continue
    fi
    nightslide train --data "$data" --split "bns/patients/not-$patient" --mpp 0.25 --out "$out/$patient" \
        --minutes "$minutes" "$@"
    weights=$out/$patient/nuclei.safetensors
    if [ "${MEAN_WITH:-}" ]; then
        python "$here/average.py" "$out/$patient/mean.safetensors" "$weights" "$weights" "$MEAN_WITH"
        weights=$out/$patient/mean.safetensors
    fi
    # shellcheck disable=SC2086 # EVALUATE holds several flags
    nightslide evaluate --data "$data" --split "bns/patients/$patient" --mpp 0.25 --weights "$weights" --json "$json" ${EVALUATE:-}
done
python "$here/tables.py" "$out" --mean
