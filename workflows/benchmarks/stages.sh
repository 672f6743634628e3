#!/usr/bin/env bash
# Seconds and mm2 per second of every stage, for one slide, twice, to compare runs and machines.
#   workflows/benchmarks/stages.sh SLIDE [flags of nightslide run]
set -euo pipefail
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;; esac
slide=${1:?"usage: stages.sh SLIDE [flags of nightslide run]"}
shift
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for round in 1 2; do
    nightslide run "$slide" --out "$out/$round" "$@"
done
