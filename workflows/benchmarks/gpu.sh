#!/usr/bin/env bash
# What a GPU does with the detector, in ten minutes: doctor, equality with the CPU, speed by batch and views, and
# without the kernels in Triton, memory and the lack of it, two processes on one device, a trace, a replicated slide from end to
# end, and four of them as an archive. One table at the end.
#   workflows/benchmarks/gpu.sh SLIDE OUT
# SLIDE: CMU-1-Small-Region.svs. OUT: a folder for the table (gpu.tsv), the logs, the trace and the ledgers.
# Environment: DEVICE (cuda), BATCHES ("1 2 4 8 16 32"), VIEWS ("1 4"), SECONDS_EACH (3), TILE (1280), ACROSS and DOWN
# (3, 3: how often the slide is repeated), PATIENCE (1: a factor to the time limits of the steps), STEPS (those to do, such as
# "device replicate giant archive"; all, where it is not given). Without a GPU:
#   DEVICE=cpu BATCHES=1 VIEWS=1 SECONDS_EACH=1 TILE=512 ACROSS=1 DOWN=1 PATIENCE=5 workflows/benchmarks/gpu.sh SLIDE OUT
# A step that fails is named in the table, and the others run.
set -uo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
here=$(dirname "$0")
usage="usage: gpu.sh SLIDE OUT"
slide=${1:?$usage} out=${2:?$usage} device=${DEVICE:-cuda}
mkdir -p "$out"
: >"$out/gpu.tsv"
read -ra batches <<<"${BATCHES:-1 2 4 8 16 32}"
read -ra views <<<"${VIEWS:-1 4}"

step() { # NAME LIMIT_S COMMAND...: its output goes to OUT/NAME.log
    local name=$1 limit_s=$2 since=$SECONDS
    [[ " ${STEPS:-$name} " == *" $name "* ]] || return 0
    shift 2
    timeout $((limit_s * ${PATIENCE:-1})) "$@" >"$out/$name.log" 2>&1 ||
        printf '%s\tFAILED with %s, see %s.log\n' "$name" "$?" "$name" >>"$out/gpu.tsv"
    printf 'seconds of the step %s\t%s\n' "$name" $((SECONDS - since)) >>"$out/gpu.tsv"
}

measure() { # WHAT LIMIT_S [flags]
    step "$1" "$2" python "$here/gpu.py" "$1" --out "$out" --slide "$slide" --device "$device" \
        --tile "${TILE:-1280}" --seconds "${SECONDS_EACH:-3}" "${@:3}"
}

step doctor 60 nightslide doctor
measure patches 120
measure speed 150 --batches "${batches[@]}" --views "${views[@]}"
measure alternatives 150 --batches "${batches[@]: -1}"
measure memory 60
measure pair 60 --batches "${batches[@]: -1}"
measure trace 60 --batches "${batches[@]: -1}"

name=$(basename "${slide%.*}") giant=$out/giant.tif
step cpu 240 nightslide run "$slide" --out "$out/on-cpu" --no-cluster --detector.device cpu --tiling.tile "${TILE:-1280}"
step device 120 nightslide run "$slide" --out "$out/on-device" --detector.device "$device" --tiling.tile "${TILE:-1280}"
step tables 60 python "$here/gpu.py" tables --out "$out" --results "$out/on-cpu/$name" "$out/on-device/$name"
rm -f "$giant"
step replicate 60 python "$here/replicate.py" "$slide" "$giant" --across "${ACROSS:-3}" --down "${DOWN:-3}"
step giant 180 nightslide run "$giant" --out "$out/of-giant" --detector.device "$device" --tiling.tile "${TILE:-1280}"
mkdir -p "$out/slides"
if [ -e "$giant" ]; then
    for copy in 1 2 3; do ln "$giant" "$out/slides/giant-$copy.tif"; done
    mv "$giant" "$out/slides/"
fi
step archive 300 nightslide run "$out/slides" --out "$out/of-archive" --detector.device "$device" \
    --tiling.tile "${TILE:-1280}"
rm -rf "$out/slides"
for run in on-device of-giant of-archive; do
    [ -e "$out/$run/ledger.csv" ] || continue
    { python - "$out/$run/ledger.csv" "$run" && sed -n "s/.*the detector computed/$run: detector computed\t/p" \
        "$out"/"${run#*-}".log; } >>"$out/gpu.tsv" <<'PY'
import csv, sys
for row in csv.DictReader(open(sys.argv[1])):
    for name, value in row.items():
        if name in ("nuclei", "tissue_mm2") or name.startswith("seconds"):
            print(f"{sys.argv[2]}: {name}", value, sep="\t")
PY
done
column -t -s "$(printf '\t')" "$out/gpu.tsv" 2>/dev/null || cat "$out/gpu.tsv"
