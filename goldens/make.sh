#!/usr/bin/env bash
# Rewrites tests/goldens with the reference implementations, in an environment of their own:
# they need PyTorch, which jaxgen does not. PYTHON names the interpreter (3.11 by default).
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.goldens-venv
stamp="$environment/.installed"
if [ ! -e "$stamp" ] || [ goldens/requirements.txt -nt "$stamp" ]; then
    "${PYTHON:-python3.11}" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r goldens/requirements.txt
    touch "$stamp"
fi
for script in goldens/write_*.py; do
    "$environment/bin/python" "$script" tests/goldens
done

# The other direction: diffusers must load what jaxgen exports. Needs `make setup`.
if [ -x .venv/bin/python ]; then
    export_folder=$(mktemp -d)
    trap 'rm -rf "$export_folder"' EXIT
    JAX_PLATFORMS=cpu PYTHONPATH=. .venv/bin/python goldens/export_mmdit.py "$export_folder"
    "$environment/bin/python" goldens/check_export.py "$export_folder"
fi
