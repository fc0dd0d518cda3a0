#!/usr/bin/env bash
# All that a CUDA device is needed for, unattended, without a network: builds, tests, conformance, sanitizers, the constants of
# the cost model, the tables, and which aims they reach. What is right comes before what is fast.
#
#   bench/gpu_all.sh OUT [STEP...]
#
# STEPs: conformance conformance-hopper tests memcheck memcheck-torch raw 768x3072 2048x16384-glu 4096x11008-glu 1024x4096 masks
# goals racecheck racecheck-hopper racecheck-torch layers blocks; by default all, in that order. The kernels of sm_90a wait on
# barriers that racecheck may not follow, so racecheck-hopper is of them alone. Where conformance-hopper hangs, or the device fails
# in it, or numbers are wrong, all that comes after runs without the kernels of sm_90a, and says so. Those of sizes are the layer beside its peers,
# layers and blocks what to tune. With RECORDED=FILE, masks that bench/record_masks.py wrote, masks has those of a converted model
# first.
#
# A call ends within about BUDGET seconds, by default 1500. The build may take them all, and without it nothing else runs. Of the
# rest every step has a share, and what those before it left of theirs: a step that takes longer is cut off, and said, for a next
# call to name; of what is to be right that is a failure, for it may hang. Tables are written row by row, what tells most first.
# What was built and found stays in build/gpu, or where that cannot be written in a folder of its own, where the next call goes on:
# finished tables and constants are not measured again. Where build/gpu was lost, STATE=results.tar.gz of the call before tells what
# it found; tables go on if the kernels have the same bytes, constants are taken if the card has the same name.
# OUT gets few files, after every step and twice a minute: the tables, and results.tar.gz of everything that was found so far.
# Where a call may last ten minutes: BUDGET=560 with the first three steps, then with raw 768x3072 4096x11008-glu goals, then with others.
#
# Needs nvcc >= 12.4 (PATH, CUDACXX or CUDA_HOME), a torch with CUDA, cmake, ninja, pybind11, pytest. Installs nothing. Exit
# status: how many steps failed, where a goal that is not reached is no failure; 2: wrong arguments, 98: the build failed, 99: no CUDA device.
set -uo pipefail
if [ -n "${RECORDED:-}" ]; then
  RECORDED=$(realpath -e "$RECORDED") || exit 2
  export RECORDED
fi
if [ -n "${STATE:-}" ]; then STATE=$(realpath -e "$STATE") || exit 2; fi
if [ $# -gt 0 ]; then set -- "$(realpath -m "$1")" "${@:2}"; fi
cd "$(dirname "$0")/.."
steps=(conformance conformance-hopper tests memcheck memcheck-torch raw 768x3072 2048x16384-glu 4096x11008-glu 1024x4096 masks
  goals racecheck racecheck-hopper racecheck-torch layers blocks)
out=${1:?"usage: bench/gpu_all.sh OUT [STEP...], STEPs: ${steps[*]}"}
for name in "${@:2}"; do
  case " ${steps[*]} " in
    *" $name "*) ;;
    *) echo "no such step: $name; STEPs: ${steps[*]}"; exit 2 ;;
  esac
done
if [ $# -gt 1 ]; then steps=("${@:2}"); fi
root=$PWD python=${PYTHON:-python3} begin=$SECONDS budget=${BUDGET:-1500}
mkdir -p "$out"
ask() { timeout 120 "$python" -c "import torch; assert torch.cuda.is_available(); $1" 2>"$out/ask.txt"; }
arch=$(ask 'print("%d%d" % torch.cuda.get_device_capability())') ||
  { echo "no CUDA device that $python's torch sees:"; tail -n 3 "$out/ask.txt"; exit 99; }
rm "$out/ask.txt"
build=$root/build/gpu
mkdir -p "$build" 2>/dev/null && [ -w "$build" ] || build=${TMPDIR:-/tmp}/sadmoe-gpu-$UID
results=$build/results bench=$build/bench_cuda
if [ -n "${STATE:-}" ] && [ ! -d "$results" ]; then tar -xzf "$STATE" -C "$build" || exit 2; fi
mkdir -p "$results"
no_hopper=$(cat "$results/no_hopper" 2>/dev/null)
rm -f "$build"/part.*
export PYTHONPATH=$build/site${PYTHONPATH:+:$PYTHONPATH} SADMOE_NEEDS_CUDA=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export CUDACXX=${CUDACXX:-$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")}
failed=() cut=()
declare -A shares=([tests]=220 [conformance]=30 [conformance-hopper]=0 [memcheck]=60 [memcheck-torch]=70 [racecheck]=60 [racecheck-hopper]=30
  [racecheck-torch]=70 [raw]=60 [constants]=40 [768x3072]=180 [recorded]=100 [masks]=60 [goals]=0 [layers]=60 [blocks]=60)
share_of() { echo "${shares[$1]:-100}"; }  # of the time after the build, in parts
due=0 parts=0
for name in "${steps[@]}"; do
  parts=$((parts + $(share_of "$name")))
  if [ "$name" = raw ]; then parts=$((parts + $(share_of constants))); fi
  if [ "$name" = masks ] && [ -n "${RECORDED:-}" ]; then parts=$((parts + $(share_of recorded))); fi
done

hand_over() {
  find "$results" -name '*.json' ! -name raw.json -exec cp {} "$out" \;
  local part
  part=$(mktemp "$build/part.XXXXXX")
  tar -czf "$part" -C "$build" results 2>/dev/null # files may grow meanwhile
  mv "$part" "$out/results.tar.gz"
}
# step NAME COMMAND...: in its share of the time.
step() {
  local name=$1 left
  shift
  due=$((due + $(share_of "$name"))) left=$((budget * due / parts - (SECONDS - begin)))
  if [ "$left" -lt 5 ]; then
    cut+=("$name"); echo "-- $name: no time left"; return 1
  fi
  run "$left" "$name" "$@"
}
# run SECONDS NAME COMMAND...: its output to NAME.txt, its end to the screen; what it has found is handed over meanwhile.
run() {
  local left=$1 name=$2 start=$SECONDS status=0 keeper
  shift 2
  while sleep 30 && kill -0 $$; do hand_over; done >/dev/null 2>&1 & # not when this script is gone
  keeper=$!
  timeout -k 5 "$left" "$@" >"$results/$name.txt" 2>&1 || status=$?
  kill "$keeper" && wait "$keeper" 2>/dev/null
  local said="FAILED ($status)"
  case $status in
    0) said=ok ;;
    77) said="LEFT OUT" ;;
    124 | 137)
      said="CUT OFF" cut+=("$name")
      case $name in conformance* | tests | memcheck* | racecheck*) failed+=("$name") ;; esac ;; # it may hang
    *) if [ "$name $status" = "goals 3" ]; then said="NOT ALL REACHED"; else failed+=("$name"); fi ;;
  esac
  printf -- '-- %s: %s, %d s\n' "$name" "$said" $((SECONDS - start))
  tail -n "${TAIL:-3}" "$results/$name.txt" | sed 's/^/   /'
  hand_over
  return "$status"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,ecc.mode.current --format=csv
  "$CUDACXX" --version | tail -2
  "$python" -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))'
  git -C "$root" rev-parse HEAD 2>/dev/null || true
}
# The package lies in build/gpu/site as an install would lay it.
compile() {
  local torch_dir
  torch_dir=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') &&
    cmake -G Ninja -S . -B "$build" "-DPython3_EXECUTABLE=$(command -v "$python")" "-DSADMOE_TORCH_DIR=$torch_dir" \
      -DSADMOE_CUDA=ON "-DSADMOE_CUDA_ARCHS=$arch-real" &&
    cmake --build "$build" -t sadmoe partition bench_cuda &&
    mkdir -p "$build/site" && cp -r python/sadmoe "$build/site" &&
    cmake --install "$build" --prefix "$build/site/sadmoe" &&
    "$python" -c 'import sadmoe; print(sadmoe.__file__, sadmoe.build_info())'
}
# peers NAME OPTION...: to NAME.json, from where a call that was cut off stopped.
peers() {
  local name=$1 constants=()
  if [ -s "$results/constants.json" ]; then constants=(--constants "$results/constants.json"); fi
  local call=("$python" bench/cuda_peers.py $no_hopper "${constants[@]}" "${@:2}" --json "$results/$name.json" --go-on) again status=0
  "${call[@]}" || status=$?
  for again in 1 2 3; do # 3: the device failed, and a new process finds it as new
    if [ "$status" != 3 ]; then break; fi
    status=0
    "${call[@]}" || status=$?
  done
  return "$status"
}
# Small problems of every kind of kernel; torch asks for each tensor's memory by itself, so that what is beyond it is seen.
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null) ||
    { echo "compute-sanitizer was not found"; return 77; }
  local check=("$tool" --tool "${1%%-*}" --error-exitcode 9) both=()
  if [ -n "$no_hopper" ]; then
    if [ "$1" = racecheck-hopper ]; then echo "without the kernels of sm_90a"; return 77; fi
    export SADMOE_NO_HOPPER=1 both=(sm_80)
  fi
  case $1 in
    racecheck) "${check[@]}" "$bench" conformance sm_80 ;;
    racecheck-hopper) "${check[@]}" "$bench" conformance sm_90a || [ $? -eq 3 ] ;; # some bits are others, by rounding
    racecheck-torch) check+=(--kernel-name-exclude kns=hopper) ;;&
    *-torch) # which probes the driver for functions that it may lack: no error
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" --report-api-errors no "$python" -m pytest tests/test_kernels.py -m cuda \
        -p no:cacheprovider -k "every_activation or one_hot or (three_stages and 150-10) or (neighbours and 9-35) or tokens_of_a_block" ;;
    *) "${check[@]}" "$bench" conformance "${both[@]}" || [ $? -eq 3 ] ;;
  esac
}
# Each file in a process of its own, for an error of the device is an error of all that a process does after; all at once, and each
# in its time: a hang says where it was, and keeps no other from its end.
tests() {
  local file files=(tests/test_kernel*.py tests/test_cuda*.py) pids=() i ended status=0
  if [ -n "$no_hopper" ]; then export SADMOE_NO_HOPPER=1 files=("${files[@]/*hopper*/}"); fi
  for file in ${files[@]}; do
    timeout -s INT -k 10 150 "$python" -m pytest "$file" -m cuda -p no:cacheprovider -o faulthandler_timeout=60 --maxfail=40 \
      >"$results/${file//\//-}.txt" 2>&1 &
    pids+=($!)
  done
  trap 'kill "${pids[@]}" 2>/dev/null' TERM # of the whole step: each has a group of its own
  i=0
  for file in ${files[@]}; do
    ended=0
    wait "${pids[i++]}" || ended=$?
    if [ "$ended" != 0 ] && [ "$ended" != 5 ]; then status=1; fi # 5: none of its tests is for a device
    echo "$file: $ended"
    tail -n 15 "$results/${file//\//-}.txt"
  done
  return $status
}
goals() {
  local tables=()
  for table in "$results"/{[0-9]*x*,recorded,masks}.json; do
    if [ -s "$table" ]; then tables+=("$table"); fi
  done
  if [ ${#tables[@]} = 0 ]; then
    echo "no table was measured"; return 77
  fi
  "$python" bench/cuda_goals.py "${tables[@]}"
}
export -f machine compile peers sanitize tests goals
export root python arch build results bench no_hopper

TAIL=20 run 60 machine bash -c machine
run $((budget > SECONDS - begin ? budget - (SECONDS - begin) : 1)) build bash -c compile || { tail -n 40 "$results/build.txt"; exit 98; }
budget=$((budget - (SECONDS - begin) - 20)) begin=$SECONDS # 20 for goals and conformance-hopper
for name in "${steps[@]}"; do
  case $name in
    conformance) TAIL=60 step conformance "$bench" conformance sm_80 ;;
    conformance-hopper)
      ended=0 no_hopper=
      TAIL=60 run 60 conformance-hopper "$bench" conformance sm_90a || ended=$? # seconds, unless it hangs
      if [ "$ended" -ne 0 ] && [ "$ended" -ne 3 ]; then no_hopper=--no-hopper; fi # 3: some bits are others, by rounding
      echo "$no_hopper" >"$results/no_hopper" # for later calls too
      if [ -n "$no_hopper" ]; then echo "-- from here on without the kernels of sm_90a"; fi ;;
    raw)
      if [ -s "$results/constants.json" ] && "$python" -c \
        'import json, sys, torch; sys.exit(torch.cuda.get_device_name() not in json.load(open(sys.argv[1])))' "$results/constants.json"; then
        # others would begin every table anew
        echo "-- raw: measured before, in $results/constants.json"
        due=$((due + $(share_of raw) + $(share_of constants)))
        continue
      fi
      rm -f "$results/raw.json"
      if step raw "$bench" $no_hopper constants "$results/raw.json"; then
        TAIL=14 step constants "$python" bench/cuda_constants.py "$results/raw.json" "$results/constants.json"
      else
        due=$((due + $(share_of constants)))
      fi ;;
    layers) TAIL=120 step layers "$bench" $no_hopper layers ;;
    blocks) TAIL=260 step blocks "$bench" $no_hopper blocks ;;
    [0-9]*x*) TAIL=150 step "$name" bash -c "peers $name --layers $name" ;;
    masks)
      if [ -n "${RECORDED:-}" ]; then TAIL=60 step recorded bash -c 'peers recorded --layers --recorded "$RECORDED" --tokens 1 64 512 8192'; fi
      TAIL=120 step masks bash -c "peers masks --masks skewed clustered --shares 0.1 0.25 --tokens 8 64 512 8192" ;;
    tests) TAIL=160 step tests bash -c tests ;;
    memcheck* | racecheck*) TAIL=20 step "$name" bash -c "sanitize $name" ;;
    goals) TAIL=120 run 60 goals bash -c goals ;; # seconds of arithmetic, also where tables were cut off
  esac
done

echo "-- $SECONDS s in all, results in $out; failed: ${failed[*]:-nothing}; cut off: ${cut[*]:-nothing}"
exit ${#failed[@]}
