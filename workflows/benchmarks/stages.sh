#!/usr/bin/env bash
# Seconds and mm2 per second of every stage, for one slide, twice: so that runs and machines can be compared.
#   workflows/benchmarks/stages.sh SLIDE [nightslide run's flags]
set -euo pipefail
slide=${1:?"usage: stages.sh SLIDE [flags of nightslide run]"}
shift
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for round in 1 2; do
    nightslide run "$slide" --out "$out/$round" "$@"
done
