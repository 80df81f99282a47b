#!/usr/bin/env bash
# Set up a virtual environment in the checkout, once, and run the first example in it; options go to quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""  # without a word it would see ours, the options
# Let glibc keep large buffers: handing them back after every training step costs much of the time in page faults.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
exec python scripts/quickstart.py "$@"
