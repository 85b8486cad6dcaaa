#!/bin/sh
# Everything that a card is asked, in minutes and without Node: each kernel and whole programs against the reference, a small set under compute-sanitizer, the benchmark,
# rivals. Lies beside the programs that `cmake -S test/gpu` builds.
#
#   sh run.sh [FOLDER]      results go to FOLDER (default: results beside this file)
#   sh run.sh --tests       without the benchmark
#   sh run.sh --bench       the benchmark alone
set -u
here=$(cd "$(dirname "$0")" && pwd)
tests=1 bench=1
case "${1:-}" in
  --tests) bench=0; shift ;;
  --bench) tests=0; shift ;;
esac
results=${1:-$here/results}
mkdir -p "$results"
failed=0

# step NAME COMMAND...: its output goes to NAME.txt too.
step() {
  name=$1
  shift
  echo "== $name"
  { "$@" 2>&1; echo $? > "$results/.status"; } | tee "$results/$name.txt"
  [ "$(cat "$results/.status")" = 0 ] || failed=1
}

set -- "$here"/programs/llama-*.jsonl "$here"/programs/qwen2-*.jsonl
if [ ! -e "$1" ]; then
  echo "no exported programs in $here/programs: write them on a machine with Node (npm run build:cuda)"
  exit 2
fi
if [ $tests = 1 ]; then
  for program in "$here"/cuda_*_test; do
    step "$(basename "$program")" "$program"
  done
  step programs "$here/program_test" "$@"
  # A card without profiling rights, a missing tool: the tool says so before the program's first line.
  if ! command -v compute-sanitizer > /dev/null; then
    echo "skip compute-sanitizer: it is not on this machine (it comes with the CUDA toolkit)"
  elif ! compute-sanitizer --tool memcheck --error-exitcode 9 "$here/program_test" --small --no-kill "$1" > "$results/.sanitizer" 2>&1 && ! grep -q "^card " "$results/.sanitizer"; then
    echo "skip compute-sanitizer: it cannot run here: $(head -3 "$results/.sanitizer" | tr '\n' ' ')"
  else
    for tool in memcheck racecheck initcheck synccheck; do
      step sanitizer-$tool compute-sanitizer --tool $tool --error-exitcode 9 "$here/program_test" --small --no-kill "$1"
    done
  fi
fi
if [ $bench = 1 ]; then
  step tune "$here/gpu_bench" --tune "$results/tuning.json"
  if [ -s "$results/tuning.json" ]; then
    step tuned-programs "$here/program_test" --tuning "$1" "$results/tuning.json"
    step bench "$here/gpu_bench" --tuning "$results/tuning.json" --json "$results/bench.json" "$here"/programs/step-*.jsonl
  fi
  if command -v python3 > /dev/null; then
    step rivals python3 "$here/rivals.py" "$results/rivals.json"
  else
    echo "skip rivals: there is no python3"
  fi
fi
rm -f "$results/.status" "$results/.sanitizer"
echo "results are in $results"
exit $failed
