#!/usr/bin/env bash
# How many long prompts a second one server answers, dense against sparse: starts it on a free loopback port and, for each
# length, runs `entropyserve-client bench` in a closed loop, then in an open loop (Poisson) at three rates that follow
# from what the closed loop carried: 0.6 of the slower policy's, between both, 1.2 of the faster one's. Runs from an
# unpacked archive (bin/load_gpu) or from a checkout.
#   OUT        folder of the results: LENGTH-closed and LENGTH-open, each .json, .csv, .html, .txt; summary.txt (./load)
#   MINUTES    the whole, about (5); the rates' number of requests follows from it. What is not done by then is cut off
#   LENGTHS    tokens of prompt and answer ("32K 128K"); of two, the longer gets two thirds of the time
#   POLICIES   two of bench (full/full,entropy/latent)    ANSWER   tokens (64)    CONCURRENCY   closed loop (1,4)
#   MODEL      checkpoint or synthetic:SHAPE (synthetic:llama-3.1-8b)    BACKEND (cuda)
#   KV_BYTES   0: what the GPU can spare    SERVER_FLAGS, BENCH_FLAGS   more of each
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
for bin in "${BIN:-$here}" "$here"/../../build{-cuda,}/bin; do
  if [[ -x $bin/entropyserve-client ]]; then break; fi
done
[[ -x $bin/entropyserve-client ]] || { echo "load_gpu: no entropyserve-client; name its folder in BIN" >&2; exit 2; }

out=${OUT:-load} policies=${POLICIES:-full/full,entropy/latent} answer=${ANSWER:-64} concurrency=${CONCURRENCY:-1,4}
read -r -a lengths <<<"${LENGTHS:-32K 128K}"
read -r -a server_flags <<<"${SERVER_FLAGS:-}"
read -r -a bench_flags <<<"${BENCH_FLAGS:-}"
end=$((SECONDS + $(awk -v m="${MINUTES:-5}" 'BEGIN {print int(60 * m)}')))
mkdir -p "$out"

tokens() { numfmt --from=iec "$1"; }
longest=0
for length in "${lengths[@]}"; do
  if (($(tokens "$length") > longest)); then longest=$(tokens "$length"); fi
done

# shellcheck source=deploy/scripts/serve.sh
. "$here/serve.sh"
find_cublaslt
start_server "$bin" "$out/server.log" --model="${MODEL:-synthetic:llama-3.1-8b}" --backend="${BACKEND:-cuda}" \
  --max-context="$longest" --kv-bytes="${KV_BYTES:-0}" --drain-seconds=1 "${server_flags[@]}"

# bench UNTIL LENGTH FLAG...: an interrupted run reports what it has.
bench() {
  local limit=$(($1 - SECONDS)) length=$2 result=0
  shift 2
  if ((limit < 1)); then limit=1; fi  # 0 is none
  timeout --signal=INT --kill-after=20 "$limit" "$bin/entropyserve-client" bench \
    --server="$address" --input-len=$(($(tokens "$length") - answer)) --output-len="$answer" \
    --policies="$policies" "$@" "${bench_flags[@]}" || result=$?
  if ((result == 124)); then echo "load_gpu: $length was cut off" >&2; else return "$result"; fi
}
files() { echo "--output-json=$out/$1.json --output-csv=$out/$1.csv --html=$out/$1.html"; }
# column NAME: of a report's CSV on stdin, one line per row.
column() { awk -F, -v name="$1" 'NR == 1 {for (i = 1; i <= NF; ++i) if ($i == name) c = i} NR > 1 {print $c}'; }

status=0
# measure LENGTH SECONDS
measure() {
  local length=$1 until=$((SECONDS + $2)) plan rates requests
  echo "=== $length tokens, $2 s"
  bench "$until" "$length" --requests=1 --seed=1000 >/dev/null || return 1  # to warm up
  # shellcheck disable=SC2046  # three words
  bench "$until" "$length" --concurrency="$concurrency" --requests=4 $(files "$length-closed") \
    >"$out/$length-closed.txt" || return 1
  if (($(column completed <"$out/$length-closed.csv" | grep -vc '^0$') < 2)); then
    echo "load_gpu: $length: the closed loop took all the time; more MINUTES" >&2
    return 1
  fi
  # What each policy carried at best, the rates that follow, and how many requests fit: a row lasts as long as its
  # arrivals or as its answers take.
  plan=$(paste <(column policy <"$out/$length-closed.csv") <(column request_throughput <"$out/$length-closed.csv") |
    awk -v left=$((until - SECONDS)) '
      $2 > most[$1] {most[$1] = $2}
      END {
        for (p in most) {if (!low || most[p] < low) low = most[p]; if (most[p] > high) high = most[p]}
        n = split((0.6 * low) " " sqrt(low * high) " " (1.2 * high), rate, " ")
        for (i = 1; i <= n; ++i) for (p in most) cost[i] += 1 / (rate[i] < most[p] ? rate[i] : most[p])
        first = 1; fit = int(left / (cost[1] + cost[2] + cost[3]))
        if (fit < 8) {first = 2; fit = int(left / (cost[2] + cost[3]))}  # the slow rate costs most and says least
        printf "%d ", (fit < 4 ? 4 : fit)
        for (i = first; i <= n; ++i) printf "%s%.3g", (i == first ? "" : ","), rate[i]
      }')
  read -r requests rates <<<"$plan"
  # shellcheck disable=SC2046
  bench $((until > SECONDS + 5 ? until + 5 : SECONDS + 10)) "$length" --rate="$rates" --requests="$requests" \
    $(files "$length-open") >"$out/$length-open.txt"
}

total=$((end - SECONDS))
for i in "${!lengths[@]}"; do
  left=$((end - SECONDS)) behind=$((${#lengths[@]} - i - 1))
  seconds=$left
  if ((behind > 0)); then seconds=$((total * (i + 1) * 2 / (${#lengths[@]} * (${#lengths[@]} + 1)))); fi
  if ((seconds < 10 || left < 10)); then
    echo "load_gpu: no time is left for ${lengths[i]}" >&2
    status=1
    break
  fi
  measure "${lengths[i]}" "$seconds" || status=1
done

{
  sed -n 's/.* info ready //p' "$out/server.log"
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
  for length in "${lengths[@]}"; do
    for part in closed open; do
      [[ -s $out/$length-$part.txt ]] || continue
      echo "--- $length tokens, $part loop"
      sed -n '/^load  /,$p' "$out/$length-$part.txt"
    done
  done
} | tee "$out/summary.txt"
exit $status
