#!/usr/bin/env bash
# Train on this machine; the same as `python -m dsv2 train`, whose --help explains everything.
#
# Usage:    [NPROC=N] launch/local.sh [overrides...]
# Example:  launch/local.sh experiment=quickstart name=first optim.lr=3e-4

set -euo pipefail
# Nothing changes the working folder, so a relative path means the same here and for train.py.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=python
[[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m dsv2 train "$@"
