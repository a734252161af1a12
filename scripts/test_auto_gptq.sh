#!/usr/bin/env bash
# Export small quantized models and load them with the real auto-gptq, in an environment of its own.
#   scripts/test_auto_gptq.sh BIN FOLDER      BIN: bin/ of bitgrid's environment; FOLDER: auto-gptq's environment
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 venv=$2 lock=requirements/auto-gptq.txt

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "test-auto-gptq skipped: auto-gptq 0.7.1 has wheels for Linux x86-64 only, this is $(uname -sm)"
  exit 0
fi
if ! cmp -s "$lock" "$venv/.installed"; then
  if ! python=$(scripts/find_python.sh 3.11 3.11 ${PYTHON311:-python3.11 python3 python}); then
    echo "test-auto-gptq skipped: auto-gptq 0.7.1 needs Python 3.11 and none was found (give one with PYTHON311=/path/to/python3.11)"
    exit 0
  fi
  echo "making $venv with $python"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  # auto-gptq's source archive cannot be built without torch at hand, so only its wheel will do.
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --only-binary auto-gptq --requirement "$lock"
  cp "$lock" "$venv/.installed"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
"$bin/python" tests/auto_gptq/make_checkpoints.py "$work"
# -c /dev/null and --noconftest: the settings of the main suite need plugins that are not here.
BITGRID_CHECKPOINTS="$work" "$venv/bin/python" -m pytest -q -c /dev/null --rootdir tests/auto_gptq --noconftest -p no:cacheprovider \
  -W ignore::FutureWarning tests/auto_gptq/test_load.py
