#!/usr/bin/env bash
# What a GPU must show: the CUDA operators agree with the CPU's, a model's logits with its reference, the policies with
# the paper's code, compute-sanitizer finds nothing, and the times of the benches. Runs from an unpacked archive
# (bin/gpu_check) or from a checkout with build-cuda. Every stage has a time limit; the last lines are a table.
#   STAGES   some of: ops model policy memcheck racecheck kernels few_rows attention masses d64 torch engine serving
#            (default: the first five)
#   OUT      folder of the logs, one per stage (default: a temporary one)
#   MEMCHECK, RACECHECK   gtest filters of cuda_ops_test for the two sanitizer stages
#   FLAGS    more flags of engine_bench and serving_bench, e.g. --linear_dtype=fp8
#   SHARE_OF_LIMIT   multiplies every limit (default 1)
# Exit status 1 when a stage failed or ran over its limit. A stage whose tool is missing is NOT RUN, which is no failure.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
if [[ -x $here/cuda_ops_test ]]; then
  bin=$here golden=$here/../share/golden
else
  bin=$here/../../build-cuda/bin golden=$here/../../tests/golden
fi
[[ -x $bin/cuda_ops_test ]] || { echo "gpu_check: no cuda_ops_test in $bin" >&2; exit 2; }

out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
stages=${STAGES:-ops model policy memcheck racecheck}
# Shared-memory races are slow to look for: the kernels that order threads by hand, on one type.
racecheck=${RACECHECK:-'All/Selection.*/bf16:All/FewRows.*/bf16:All/PrefillAttention.OverLists/bf16:Sample.SameTokensAndLogprobs'}
memcheck=${MEMCHECK:-'*'}
read -r -a flags <<<"${FLAGS:-}"
table=() failed=0

# shellcheck source=deploy/scripts/serve.sh
. "$here/serve.sh"
find_cublaslt

# run NAME LIMIT COMMAND...: the limit in seconds.
run() {
  local name=$1 limit=$2 start=$SECONDS result=ok status=0 note
  shift 2
  limit=$(awk -v a="$limit" -v b="${SHARE_OF_LIMIT:-1}" 'BEGIN {print int(a * b)}')
  echo "=== $name: $*"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n "${LINES_SHOWN:-60}" "$out/$name.log"
  if ((status == 124 || status == 137)); then
    result="over $limit s"
  elif ((status != 0)); then
    result="FAILED ($status)"
  fi
  [[ $result == ok ]] || failed=1
  note=$(grep -E '\[ +(PASSED|FAILED) |(ERROR|RACECHECK) SUMMARY|WRONG' "$out/$name.log" | tail -n 2 | paste -sd' ' || true)
  table+=("$(printf '%-10s %-14s %5d s  %s' "$name" "$result" $((SECONDS - start)) "$note")")
}
not_run() { table+=("$(printf '%-10s %-14s        %s' "$1" "NOT RUN" "$2")"); }

# sanitize NAME LIMIT TOOL FILTER [FLAG...]
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  if [[ -z $tool ]]; then
    not_run "$1" "no compute-sanitizer"
    return
  fi
  run "$1" "$2" "$tool" --tool "$3" "${@:5}" "$bin/cuda_ops_test" --gtest_filter="$4"
}

for stage in $stages; do
  case $stage in
    ops) run ops 120 "$bin/cuda_ops_test" --gtest_brief=1 ;;
    model) run model 120 env ES_TEST_BACKEND=cuda ES_GOLDEN_DIR="$golden" "$bin/model_test" --gtest_brief=1 ;;
    policy)
      run policy 60 "$bin/policy_check" --backend=cuda "$golden"/entropy_reference/*.safetensors
      run shapes 60 "$bin/policy_check" --backend=cuda \
        "$golden"/policy/{block4_group7,block32_group1_maxpool,one_segment}.safetensors
      ;;
    memcheck) sanitize memcheck 240 memcheck "$memcheck" --error-exitcode 1 ;;
    racecheck)
      # It reports hazards inside cuBLASLt's own kernels (nvjet_*), too, and fails when told to leave them out.
      sanitize racecheck 240 racecheck "$racecheck"
      if grep 'Race reported' "$out/racecheck.log" 2>/dev/null | grep -v nvjet; then
        failed=1
        table+=("racecheck: the hazards above are in kernels of ours")
      fi
      ;;
    kernels) run kernels 180 "$bin/kernel_bench" ;;
    few_rows) run few_rows 120 "$bin/kernel_bench" --few_rows ;;
    attention) run attention 180 "$bin/prefill_attention_bench" ;;
    masses) run masses 120 "$bin/block_mass_bench" ;;
    torch)
      if python3 -c 'import torch' 2>/dev/null; then
        run torch 180 python3 "$(ls "$bin/torch_attention_bench.py" "$here/../../tests/bench/torch_attention_bench.py" 2>/dev/null | head -n 1)"
      else
        not_run torch "python3 has no torch"
      fi
      ;;
    engine) run engine 540 "$bin/engine_bench" --backend=cuda --breakdown=true --lengths=32768,131072 \
      --policies=full,fixed1,fixed2 --runs=1 --decode=1,32 --decode_context=131072 "${flags[@]}" ;;
    d64)
      run attention64 120 "$bin/prefill_attention_bench" --time --head_dim=64
      run masses64 60 "$bin/block_mass_bench" --time --head_dim=64
      ;;
    serving) run serving 540 "$bin/serving_bench" --backend=cuda "${flags[@]}" ;;
    *) echo "gpu_check: unknown stage \"$stage\"" >&2; exit 2 ;;
  esac
done

echo "=== $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo no GPU); logs in $out"
printf '%s\n' "${table[@]}"
exit $failed
