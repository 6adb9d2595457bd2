#!/usr/bin/env bash
# Qualifies this package on the NVIDIA GPU at hand: builds for it, tests it, measures it. No network is needed.
#
#   benchmarks/qualify.sh PART[=SECONDS]... [OUT_DIR]
#
#   build      compile for the GPUs present and install into the current Python environment
#   test       pytest -m gpu, without the Triton kernels' own tests, which compile for minutes: those are test-triton;
#              and without compute-sanitizer, which takes minutes: that is sanitize. With pytest-xdist the tests run in
#              several processes (WORKERS, default: one a core, 16 at most); with pytest-timeout one that hangs for 100
#              seconds ends. The test of `tune` is left to the part of that name, which needs all cores for minutes.
#   verify     every operator of every backend against fp64, in as many processes
#   tune       the fastest configurations of the Triton kernels at the stages of ConvNeXt-T and -B, into OUT_DIR: what
#              runs later with the same OUT_DIR runs with them
#   bench      the fused block against eager PyTorch, in a minute
#   operators, blocks, models
#              the benchmark suite in three parts, without the providers that compile, which are operators-compile,
#              blocks-compile and models-compile (ours beside them). `python -m benchmarks.report` and
#              `python -m benchmarks.goals` take the JSON files of several parts as one.
#   counters   what the operators' kernels wait for, by NVIDIA's ncu
#   baseline   timm and torchvision without this package; baseline-eager, baseline-torchvision, baseline-compile and
#              baseline-max-autotune choose one part, baseline alone is the first. What does not fit into a run is done
#              by the next one with the same OUT_DIR.
#   all        build, test, test-triton, sanitize, verify, tune, operators, models, blocks, counters, baseline
#
# Logs and JSON go to OUT_DIR (default: the environment variable OUT). Each part ends within its SECONDS (default: 530);
# tests and cases that do not begin in time are left out, which fails a part of tests. Every part but the baseline
# installs first, which takes seconds where nothing changed, or not at all where CONVNEXT_KERNELS_LIBRARY_DIR names a
# folder with libraries that were compiled before, for this GPU and under any PyTorch from 2.11: then the checkout runs
# with them (the part build compiles all the same). The exit code is 0 only if every part succeeded. PYTHON names the
# interpreter (default: python3); it needs torch with CUDA, nvcc, setuptools, ninja and pybind11, for the tests and the
# baseline pytest, timm and torchvision, and for the suite pytest-benchmark.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

parts=()
out=${OUT:-}
while [ $# -gt 0 ]; do
  case ${1%=*} in
    build | test | test-triton | sanitize | verify | tune | bench | operators | blocks | models | operators-compile | \
      blocks-compile | models-compile | counters | baseline | baseline-eager | baseline-torchvision | \
      baseline-compile | baseline-max-autotune)
      [[ $1 =~ ^[a-z-]+(=[1-9][0-9]*)?$ ]] || usage
      parts+=("$1")
      ;;
    all) parts+=(build test test-triton sanitize verify tune operators models blocks counters baseline) ;;
    -*) usage ;;
    *)
      # Only the last argument may be the folder: a misspelt part must not become one.
      [ $# -eq 1 ] || usage
      out=$1
      ;;
  esac
  shift
done
if [ ${#parts[@]} -eq 0 ] || [ -z "$out" ]; then usage; fi

workers=${WORKERS:-$(($(nproc) < 16 ? $(nproc) : 16))}
if ! capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null); then
  echo "qualify.sh: nvidia-smi finds no GPU: there is nothing to qualify here" >&2
  exit 2
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
export CONVNEXT_KERNELS_CACHE_DIR=$out
if [ -n "${CONVNEXT_KERNELS_LIBRARY_DIR:-}" ]; then
  CONVNEXT_KERNELS_LIBRARY_DIR=$(cd "$CONVNEXT_KERNELS_LIBRARY_DIR" && pwd)
  export CONVNEXT_KERNELS_LIBRARY_DIR PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi

# Runs a command within what is left of the part's time, with its output in a log too.
limited() {
  local log=$1 left=$((part_seconds - SECONDS))
  shift
  if [ "$left" -le 0 ]; then
    echo "qualify.sh: no time left for: $*" >&2
    return 124
  fi
  echo "+ $*"
  # What has been measured is written once the time is up.
  timeout --kill-after=10 "$left" "$@" 2>&1 | tee -a "$log"
}

install_package() {
  if [ "$1" != build ] && [ -n "${CONVNEXT_KERNELS_LIBRARY_DIR:-}" ]; then return; fi
  : > "$out/build.log"
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(sort -u <<< "$capabilities" | paste -sd ';')} CONVNEXT_KERNELS_CUDA=1 \
    limited "$out/build.log" "$python" -m pip install --verbose --no-build-isolation --no-deps "$root"
}

# When the last test or case may begin: a third of the part before its end, or as many seconds as are given.
budget() {
  local margin=$((part_seconds / 3))
  echo $((part_seconds - (margin < $1 ? margin : $1)))
}

# pytest -m gpu; what does not begin in time is left out, and listed.
run_tests() {
  local log=$1 options=()
  shift
  if "$python" -c 'import xdist' 2> /dev/null; then
    options+=(-n "$workers" --dist worksteal)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else each of them starts as many threads as there are cores
  fi
  if "$python" -c 'import pytest_timeout' 2> /dev/null; then
    # A kernel that never ends keeps its process from hearing signals: the process ends itself.
    options+=(--timeout 100 --timeout-method thread)
  fi
  : > "$log"
  (cd "$root" && limited "$log" "$python" -m pytest -m gpu ${options[@]+"${options[@]}"} \
    --test-budget "$(budget 40)" "$@")
}

run_part() {
  local part=$1 status=0
  case $part in
    build)
      unset CONVNEXT_KERNELS_LIBRARY_DIR
      install_package build
      # From elsewhere than the checkout, so that it is the installed package that answers.
      (cd "$out" && limited "$out/build.log" env -u PYTHONPATH "$python" -m convnext_kernels info)
      ;;
    test)
      install_package "$part"
      run_tests "$out/test.log" tests --ignore-glob='tests/test_gpu_triton*' \
        --ignore=tests/test_gpu_sanitizer.py --deselect=tests/test_tune.py::test_it_tunes_on_a_gpu
      ;;
    test-triton)
      install_package "$part"
      run_tests "$out/test-triton.log" "$root"/tests/test_gpu_triton*
      ;;
    sanitize)
      install_package "$part"
      : > "$out/sanitize.log"
      (cd "$root" && limited "$out/sanitize.log" "$python" -m pytest -m gpu tests/test_gpu_sanitizer.py)
      ;;
    tune)
      install_package "$part"
      : > "$out/tune.log"
      (cd "$out" && limited "$out/tune.log" "$python" -m convnext_kernels tune --batch 128 \
        --stages 96@56 192@28 384@14 768@7 128@56 256@28 512@14 1024@7) || status=$?
      # 124: the time ended before the stages did. What was found is kept after each.
      [ $status -eq 0 ] || [ $status -eq 124 ] || return $status
      ;;
    verify | bench)
      install_package "$part"
      : > "$out/$part.log"
      local jobs=()
      if [ "$part" = verify ]; then jobs=(--jobs "$workers"); fi
      (cd "$out" && limited "$out/$part.log" "$python" -m convnext_kernels "$part" --device cuda \
        ${jobs[@]+"${jobs[@]}"} --json "$out/$part.json")
      ;;
    operators* | blocks* | models*)
      install_package "$part"
      : > "$out/$part.log"
      local file providers
      case $part in
        operators*) file=benchmarks/test_operators.py ;;
        blocks*) file=benchmarks/test_block.py ;;
        models*) file=benchmarks/test_model.py ;;
      esac
      case $part in
        *-compile) providers="compile or autotune or ours] or eager] or timm]" ;;
        *) providers="not compile and not autotune" ;;
      esac
      # What was measured by then is in the file.
      (cd "$root" && limited "$out/$part.log" "$python" -m pytest "$file" --benchmark-only -q --device cuda \
        -k "$providers" --budget "$(budget 90)" --benchmark-json "$out/$part.json")
      ;;
    counters)
      install_package "$part"
      : > "$out/$part.log"
      (cd "$root" && limited "$out/$part.log" "$python" -m benchmarks.counters --budget "$(budget 90)" \
        --csv "$out/$part.csv" --json "$out/$part.json")
      ;;
    baseline*)
      local cases=${part#baseline}
      cases=${cases#-}
      : > "$out/$part.log"
      limited "$out/$part.log" "$python" "$root/benchmarks/baseline.py" --part "${cases:-eager}" \
        --out "$out/baseline.json" --budget-seconds $((part_seconds - 20)) || status=$?
      # 3: the budget ended before the cases did. All that was measured is in the file.
      [ $status -eq 3 ] || return $status
      ;;
  esac
}

failed=()
for part in "${parts[@]}"; do
  part_seconds=530
  if [[ $part == *=* ]]; then part_seconds=${part#*=}; fi
  part=${part%=*}
  SECONDS=0
  echo "=== $part"
  # A shell of its own, because `set -e` is off inside the condition of an `if`.
  set +e
  (
    set -e
    run_part "$part"
  )
  status=$?
  set -e
  if [ $status -eq 0 ]; then
    echo "=== $part: ok after $SECONDS s"
  else
    echo "=== $part: FAILED with exit code $status after $SECONDS s" >&2
    failed+=("$part")
  fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "qualify.sh: failed: ${failed[*]}" >&2
  exit 1
fi
