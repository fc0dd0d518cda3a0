#!/usr/bin/env bash
# All that a CUDA device is needed for, unattended, without a network: builds, tests, conformance, sanitizers, the constants
# of the cost model, the tables. Within 25 minutes: a step that its time or what is left does not hold is cut off, and said.
#
#   bench/gpu_all.sh [FOLDER]    results and logs; by default bench/results/<card>
#
# Needs nvcc >= 12.4 (PATH, CUDACXX or CUDA_HOME), a torch with CUDA, setuptools, cmake, ninja, pybind11, pytest. Installs into
# the folder alone. Exit status: how many steps failed.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3} begin=$SECONDS budget=${BUDGET:-1440}
ask() { "$python" -c "import torch; assert torch.cuda.is_available(); $1" 2>/dev/null; }
card=$(ask 'print(torch.cuda.get_device_name().replace(" ", "-"))') || { echo "no CUDA device that $python's torch sees"; exit 99; }
arch=$(ask 'print("%d%d" % torch.cuda.get_device_capability())')
out=$(mkdir -p "${1:-bench/results/$card}" && cd "${1:-bench/results/$card}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$work/site PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export CUDACXX=${CUDACXX:-$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")}
bench=$work/build/bench_cuda
export SADMOE_BENCH_CUDA=$bench
failed=()

# step NAME SECONDS COMMAND...: its output to NAME.txt, its end to the screen.
step() {
  local name=$1 limit=$2 left=$((budget - (SECONDS - begin))) start=$SECONDS status=0
  shift 2
  if [ "$left" -lt 5 ]; then
    failed+=("$name"); echo "-- $name: no time left"; return
  fi
  timeout -k 5 $((limit < left ? limit : left)) "$@" >"$out/$name.txt" 2>&1 || status=$?
  if [ $status -ne 0 ]; then failed+=("$name"); fi
  printf -- '-- %s: %s, %d s\n' "$name" "$([ $status -eq 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - start))
  tail -n "${TAIL:-3}" "$out/$name.txt" | sed 's/^/   /'
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,ecc.mode.current --format=csv
  "$CUDACXX" --version | tail -2
  "$python" -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))'
  git -C "$root" rev-parse HEAD 2>/dev/null || true
}
install() {
  SADMOE_CUDA=on SADMOE_CUDA_ARCHS="$arch-real" "$python" -m pip install --no-index --no-deps --no-build-isolation --target "$work/site" . &&
    cd "$work" && "$python" -c 'import sadmoe; print(sadmoe.build_info())'
}
build() {
  local torch_dir
  torch_dir=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') &&
    cmake -G Ninja -S . -B "$work/build" "-DPython3_EXECUTABLE=$(command -v "$python")" "-DSADMOE_TORCH_DIR=$torch_dir" \
      -DSADMOE_CUDA=ON "-DSADMOE_CUDA_ARCHS=$arch-real" && cmake --build "$work/build" -t bench_cuda
}
# Small problems of every kind of kernel, by both tools.
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null) ||
    { echo "compute-sanitizer was not found: left out"; return 0; }
  "$tool" --tool "$1" --error-exitcode 9 "$bench" conformance &&
    "$tool" --tool "$1" --error-exitcode 9 "$python" -m pytest tests/test_cuda.py -m cuda -p no:cacheprovider \
      -k "every_activation or one_hot or three_stages or neighbours"
}
export -f machine install build sanitize
export root python arch work out bench

TAIL=20 step machine 30 bash -c machine
step install 240 bash -c install
step build 240 bash -c build
TAIL=40 step conformance 60 "$bench" conformance
TAIL=12 step tests 240 "$python" -m pytest tests/test_cuda.py tests/test_cuda_hopper.py tests/test_cuda_shapes.py tests/test_cuda_device.py -m cuda -p no:cacheprovider
step memcheck 150 bash -c 'sanitize memcheck'
step racecheck 150 bash -c 'sanitize racecheck'
step raw 90 "$bench" constants "$out/raw.json"
TAIL=14 step constants 60 "$python" bench/cuda_constants.py "$out/raw.json" "$out/constants.json"
constants=()
if [ -s "$out/constants.json" ]; then constants=(--constants "$out/constants.json"); fi
TAIL=200 step peers 420 "$python" bench/cuda_peers.py "${constants[@]}" --json "$out/peers.json"
TAIL=60 step layers 180 "$bench" layers

echo "-- $((SECONDS - begin)) s in all, results in $out; failed: ${failed[*]:-nothing}"
exit ${#failed[@]}
