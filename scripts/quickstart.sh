#!/usr/bin/env bash
# Set up a virtual environment in the checkout, once, and run the first example in it; options go to quickstart.py, paths
# in them from where this was called.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
checkout=$PWD
source scripts/environment.sh ""  # without a word it would see ours, the options
# Let glibc keep large buffers: handing them back after every training step costs much of the time in page faults.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
cd "$caller"
exec python "$checkout/scripts/quickstart.py" "$@"
