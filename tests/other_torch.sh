#!/usr/bin/env bash
# Runs the CPU operator tests on the very files built here, under the PyTorch of another environment: the libraries use
# the stable ABI, so what one PyTorch (2.11 or newer) built runs under every other.
#
#   tests/other_torch.sh PYTHON [PYTEST_ARGUMENT...]
#
# PYTHON is the other environment's interpreter; it needs torch, numpy, pytest and hypothesis. The files are those in
# CONVNEXT_KERNELS_LIBRARY_DIR or, where that is not set, of the package that `python3` imports.
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
python=$1
shift

if [ -z "${CONVNEXT_KERNELS_LIBRARY_DIR:-}" ]; then
  CONVNEXT_KERNELS_LIBRARY_DIR=$(python3 -c 'from convnext_kernels import native; print(native.status().folder)')
fi
export CONVNEXT_KERNELS_LIBRARY_DIR
sha256sum "$CONVNEXT_KERNELS_LIBRARY_DIR"/libconvnext_kernels_*.so
"$python" -c 'import sys, torch; print("under PyTorch", torch.__version__, "and Python", sys.version.split()[0])'
exec "$python" -m pytest -p no:cacheprovider -m "not gpu" tests/test_operators.py tests/test_*_cpu.py "$@"
