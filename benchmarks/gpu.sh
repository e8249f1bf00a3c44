#!/usr/bin/env bash
# GPU tests, every benchmark, whole steps against TRL, then the results as JSON: one command, under 9 minutes on one GPU.
# usage: benchmarks/gpu.sh [OUT_DIR]     PYTHON=… chooses the interpreter (default: .venv/bin/python, else python3)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" # a clone will do, nothing has to be installed
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
mkdir -p "$out"
failed=0
part() { # seconds, name, command …
    local limit=$1 name=$2
    shift 2
    echo "== $name (at most ${limit} s)"
    timeout "$limit" "$@" || { echo "== $name: exit status $?" >&2; failed=1; }
}

"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no CUDA device here")' || exit 2
part 150 "GPU tests" "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors tests
name=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
part 180 "benchmarks" "$python" -m benchmarks.run --json "$out/$name.json"
# As many cases as fit, the most telling first; all of them: python -m benchmarks.vs_trl
part 200 "against TRL" "$python" -m benchmarks.vs_trl --no-best --seconds 70 --json "$out/vs-trl-$name.json"
echo "== results"
for file in "$out/$name.json" "$out/vs-trl-$name.json"; do
    cat "$file" 2>/dev/null || { echo "not written: $file" >&2; failed=1; }
done
exit "$failed"
