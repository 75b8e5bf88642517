#!/bin/sh
# Everything that is to be measured on a GPU, in one command of at most 8 minutes; see bench/gpu.py.
#
#     bench/gpu.sh OUT [DATA] [--steps STEP...] [--seconds N]
#     TINY=1 bench/gpu.sh OUT [DATA]    the same at tiny sizes on a CPU, without that limit
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/bench/gpu.py" "$@"
