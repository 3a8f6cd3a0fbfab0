#!/usr/bin/env bash
# Print a Python >= 3.12 that can make virtual environments, or explain what is missing.
# Order: $PYTHON, python3.12 and newer on PATH, python3, then one that uv provides.
set -u

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if usable "$PYTHON"; then echo "$PYTHON"; exit 0; fi
    echo "PYTHON=$PYTHON is not a Python 3.12 or newer with the venv module." >&2
    exit 1
fi
for candidate in python3.12 python3.13 python3.14 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && usable "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
if command -v uv >/dev/null 2>&1; then
    found=$(uv python find --system '>=3.12' 2>/dev/null) && usable "$found" && echo "$found" && exit 0
    uv python install 3.12 >&2 && uv python find --managed-python 3.12 && exit 0
fi
found=$(python3 --version 2>/dev/null || echo "none")
cat >&2 <<MESSAGE
jaxgen needs Python 3.12 or newer with the venv module; python3 here is: $found.
Install one of these and run make again:
  - Python 3.12+ from your system (on Debian and Ubuntu: python3.12 and python3.12-venv)
  - uv, which brings its own Python
or name one yourself: make PYTHON=/path/to/python3.12 ...
MESSAGE
exit 1
