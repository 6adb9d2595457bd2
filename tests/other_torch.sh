#!/usr/bin/env bash
# Builds the libraries with the headers of another environment's PyTorch, and runs the CPU operator tests there on the
# very files built here: the libraries use the stable ABI, so what one PyTorch (2.11 or newer) built runs under every
# other. Headers are no part of that promise: what a newer PyTorch's have, an older one's may lack.
#
#   tests/other_torch.sh PYTHON [PYTEST_ARGUMENT...]
#
# PYTHON is the other environment's interpreter; it needs torch, numpy, pytest and hypothesis, and to build setuptools,
# ninja and pybind11. The files are those in CONVNEXT_KERNELS_LIBRARY_DIR or, where that is not set, of the package that
# `python3` imports.
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
python=$1
shift

"$python" -c 'import sys, torch; print("under PyTorch", torch.__version__, "and Python", sys.version.split()[0])'
built=$(mktemp -d)
trap 'rm -r "$built"' EXIT
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} "$python" setup.py build_ext --build-lib "$built"
ls -l "$built"/convnext_kernels/*.so

if [ -z "${CONVNEXT_KERNELS_LIBRARY_DIR:-}" ]; then
  CONVNEXT_KERNELS_LIBRARY_DIR=$(python3 -c 'from convnext_kernels import native; print(native.status().folder)')
fi
export CONVNEXT_KERNELS_LIBRARY_DIR
sha256sum "$CONVNEXT_KERNELS_LIBRARY_DIR"/libconvnext_kernels_*.so
"$python" -m pytest -p no:cacheprovider -m "not gpu" tests/test_operators.py tests/test_*_cpu.py "$@"
