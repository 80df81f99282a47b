#!/usr/bin/env bash
# Set up a virtual environment in the checkout, once, and run the first example in it; options go to quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
# Threads that wait do not spin: on a machine that does other things too, that is many times faster.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec python scripts/quickstart.py "$@"
