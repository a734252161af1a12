#!/usr/bin/env bash
# Print the first interpreter whose version lies in a range and that can make virtual environments.
#   scripts/find_python.sh 3.10 3.14 [candidate ...]
set -euo pipefail
low=$1 high=$2
shift 2
for name in "$@"; do
  # A version manager's shim may exist without the version behind it, so each candidate is run, not only looked up.
  if path=$(command -v "$name") && "$path" - "$low" "$high" <<'PY' >/dev/null 2>&1
import sys, venv, ensurepip
low, high = (tuple(map(int, v.split("."))) for v in sys.argv[1:])
sys.exit(not low <= sys.version_info[:2] <= high)
PY
  then
    "$path" -c 'import sys; print(sys.executable)'
    exit 0
  fi
done
exit 1
