#!/usr/bin/env bash
# Set up a virtual environment in the checkout, once, and run the first example in it; options go to quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec python scripts/quickstart.py "$@"
