#!/usr/bin/env bash
# Compare our methods with other toolkits' on the same weights and calibration tokens, through the product's own way into them.
#   scripts/test_toolkits.sh BIN FOLDER NAME ...      BIN: bin/ of bitgrid's environment; FOLDER: of the toolkits' environments
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 folder=$2
shift 2

tests=()
for name in "$@"; do
  "$bin/python" -m orchestrator.cli toolkit install "$name" --dir "$folder"
  tests+=("tests/toolkits/test_$name.py")
done
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= BITGRID_TOOLKITS="$folder"
"$bin/python" -m pytest -q -o norecursedirs=.git --timeout 1200 "${tests[@]}"
