#!/usr/bin/env bash
# Make a virtual environment and install bitgrid into it, editable, with everything tests and checks need.
#   scripts/setup.sh FOLDER        PYTHON=/path/to/python chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

if [ ! -x "$venv/bin/python" ]; then
  candidates=(${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python})
  if ! python=$(scripts/find_python.sh 3.10 3.14 "${candidates[@]}"); then
    cat >&2 <<TEXT
bitgrid needs Python 3.10 to 3.14 with its venv module; none of these is one: ${candidates[*]}
  Debian or Ubuntu:  sudo apt install python3 python3-venv
  macOS:             brew install python@3.12
  another folder:    make PYTHON=/path/to/python3.12 test
TEXT
    exit 1
  fi
  echo "making $venv with $python"
  "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
torch=$("$venv/bin/python" - <<'PY'
import re
print(re.search(r'"(torch[<>=!~][^"]*)"', open("pyproject.toml").read()).group(1))
PY
)
# First and alone: nothing that depends on torch can then choose another release, and pip looks at its large files once.
echo "installing $torch"
"${pip[@]}" "$torch"
echo "installing bitgrid and its dependencies"
"${pip[@]}" --editable '.[dev]'
echo "building the C++ libraries"
"$venv/bin/python" scripts/build_libraries.py
# Or each test process would compile all modules for itself.
echo "compiling modules"
"$venv/bin/python" -m pytest -q --collect-only >/dev/null || true
