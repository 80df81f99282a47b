#!/usr/bin/env bash
# Set up a virtual environment in the checkout, once, and run the whole test suite in it.
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/test_x.py     a part; arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
ruff check .
ruff format --check .
# Two processes of one thread each: most tests are too small for more, and many start processes of their own.
export OMP_NUM_THREADS=1
exec python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder "$@"
