#!/usr/bin/env bash
# Train on this machine; the same as `python -m dsv2 train`, whose --help explains everything.
#
# Usage:    [NPROC=N] launch/local.sh [overrides...]
# Example:  launch/local.sh experiment=quickstart name=first optim.lr=3e-4

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=python
[[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
exec "$PYTHON" -m dsv2 train "$@"
