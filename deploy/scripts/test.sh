#!/usr/bin/env bash
# Builds and runs all tests, in stages, each with its time:
#   asan  clang, ASan + UBSan: kernels, engine, parsers; every fuzz target for FUZZ_SECONDS
#   tsan  gcc, TSan: what runs on several threads
#   cpu   everything as it ships; last, so that the output ends with ctest's own summary
# STAGES picks some of them, JOBS the parallelism.
set -euo pipefail
cd "$(dirname "$0")/../.."

stages=${STAGES:-asan tsan cpu}
jobs=${JOBS:-$(nproc)}
fuzz_seconds=${FUZZ_SECONDS:-60}
summary=()

# stage NAME COMMAND...: runs it and notes how long it took.
stage() {
  local name=$1 start=$SECONDS
  shift
  echo "=== $name"
  "$@"
  summary+=("$(printf '%-34s %5d s' "$name" $((SECONDS - start)))")
  echo "=== ${summary[-1]}"
}

# build PRESET TARGET
build() {
  cmake --preset "$1"
  cmake --build "$2" --parallel "$jobs" --target "$3"
}

# Everything but what is labelled slow: those tests repeat the same code on larger inputs.
run_asan() {
  ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
    ctest --test-dir build-asan --output-on-failure --parallel "$jobs" -LE slow
}

run_tsan() {
  TSAN_OPTIONS=halt_on_error=1 \
    ctest --test-dir build-tsan --output-on-failure --parallel "$jobs" -L threads -LE slow
}

# fuzz_one PROGRAM DIR: new inputs go to DIR, never into the checked-in corpus.
fuzz_one() {
  local program=$1 name dir
  name=$(basename "$program")
  dir=$2/$name
  mkdir -p "$dir/found"
  if "$program" -max_total_time="$fuzz_seconds" -timeout=20 -rss_limit_mb=2048 \
      -artifact_prefix="$dir/" "$dir/found" "tests/fuzz/corpus/$name" >"$dir/log" 2>&1; then
    echo "fuzz $name: $(grep -a '^Done' "$dir/log")"
  else
    tail -n 60 "$dir/log"
    echo "fuzz $name: FAILED, the input lies in $dir"
    return 1
  fi
}

run_fuzz() {
  local dir program
  dir=$(mktemp -d)
  export -f fuzz_one
  export fuzz_seconds
  for program in build-asan/bin/*_fuzz; do
    [[ -d tests/fuzz/corpus/$(basename "$program") ]] ||
      { echo "no corpus for $program"; return 1; }
  done
  printf '%s\n' build-asan/bin/*_fuzz |
    xargs -P 2 -I {} bash -c 'set -euo pipefail; fuzz_one {} '"$dir"
  rm -rf "$dir"
}

# smollm2_check needs a real model; without a network and without the file, the rest still runs.
fetch_model() {
  deploy/scripts/fetch_demo_model.sh >/dev/null ||
    summary+=("SmolLM2-135M-Instruct could not be fetched: smollm2_check is NOT RUN")
}

# Likewise Kubernetes' schemas and Envoy.
fetch_test_tools() {
  deploy/scripts/fetch_test_tools.sh >/dev/null || summary+=(
    "Kubernetes' schemas or Envoy could not be fetched: deploy_check leaves the manifests out, envoy_check is NOT RUN")
}

for name in $stages; do
  case $name in
    asan)
      stage "asan: build" build asan build-asan all
      stage "asan: tests" run_asan
      stage "asan: fuzz, $fuzz_seconds s each" run_fuzz
      ;;
    tsan)
      stage "tsan: build" build tsan build-tsan thread_tests
      stage "tsan: tests" run_tsan
      ;;
    cpu)
      fetch_model
      fetch_test_tools
      stage "cpu: build" build cpu build all
      ;;
    *) echo "unknown stage \"$name\"" >&2; exit 2 ;;
  esac
done

echo "=== times"
printf '%s\n' "${summary[@]}"
if [[ " $stages " == *" cpu "* ]]; then
  echo "=== cpu: tests"
  ctest --test-dir build --output-on-failure --parallel "$jobs"
fi
