#!/usr/bin/env bash
# Read-only checks. Prints nothing when all is well; otherwise the output of every check that failed.
#   scripts/check.sh BIN
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$1
failed=0
run() {
  local out
  if ! out=$("$@" 2>&1); then
    printf -- '--- %s\n%s\n' "${*##*/}" "$out"
    failed=1
  fi
}
run "$bin/ruff" format --check --quiet .
run "$bin/ruff" check --quiet .
run "$bin/python" scripts/check_lengths.py
run "$bin/mypy" --no-error-summary
run "$bin/lint-imports" --no-cache
exit $failed
