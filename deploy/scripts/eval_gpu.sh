#!/usr/bin/env bash
# What policies cost on one model: starts the server on a free loopback port, measures tasks, divergence on a
# text and a sweep, stops the server. Ends within MINUTES, and goes on where it ended when run again.
#   eval_gpu.sh BIN MODEL OUT [LENGTHS]    folder of the programs, checkpoint, folder of results, e.g. 8K,32K
#   MINUTES   of the client's runs together (20): half for tasks, a quarter each for text and sweep
#   TASKS, POLICIES, N, CONCURRENCY        of the tasks; N prompts of each (20)
#   TEXT      for haystack and divergence; empty: made-up sentences, and the repository's sources and pages, which an
#             unpacked archive has not: there it is tasks only
#   SERVER_FLAGS                           more flags of entropyserve, e.g. --backend=cuda
set -euo pipefail

if [[ $# -lt 3 ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
bin=$1 model=$2 out=$3 lengths=${4:-8K,32K}
minutes=${MINUTES:-20}
text=${TEXT:-}
repository=$(cd "$(dirname "$0")/../.." && pwd)
small=dense_prefix=1024:base=1024  # acts on prompts of a few thousand tokens, too
policies=${POLICIES:-full+full,full+latent:budget=1024,entropy:$small+full,entropy:$small+latent:budget=1024,coverage:dense_prefix=1024+full,coverage:dense_prefix=1024+latent:budget=1024,default+default}
tasks=${TASKS:-niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multivalue,niah_multiquery,vt,cwe,fwe,qa_facts,kv_retrieval,niah_multikey_1/hidden,kv_retrieval/turns}
mkdir -p "$out"

# shellcheck source=deploy/scripts/serve.sh
. "$(dirname "$0")/serve.sh"
read -r -a server_flags <<<"${SERVER_FLAGS:-}"
find_cublaslt
start_server "$bin" "$work/log" --model="$model" --allow-compare "${server_flags[@]}"

haystack=()
if [[ -n $text ]]; then
  haystack=(--haystack="$text")
elif [[ -d $repository/engine ]]; then
  # Not repeated text: a copy of what was read already is too easy to predict. Eight windows of 32k
  # tokens take about 1 MB.
  text=$work/repository.txt
  (cd "$repository" && find docs engine server client kernels tests \( -name '*.md' -o -name '*.cc' -o -name '*.h' \) -print0 \
    | LC_ALL=C sort -z | xargs -0 cat) >"$text"
fi

# $1: name of the result, $2: minutes; then flags. A part that fails does not keep the others from running.
status=0
run() {
  local part=$1 part_minutes=$2
  shift 2
  echo "== $part" >&2
  "$bin/entropyserve-client" eval --server="$address" --lengths="$lengths" \
    --minutes="$part_minutes" --output="$out/$part.jsonl" --resume --html="$out/$part.html" "$@" \
    | tee "$out/$part.txt" || status=1
}
share() { awk -v m="$minutes" -v s="$1" 'BEGIN { print m * s }'; }
run tasks "$(share "$([[ -n $text ]] && echo 0.5 || echo 1)")" --tasks="$tasks" --policies="$policies" --n="${N:-20}" "${haystack[@]}" \
  --concurrency="${CONCURRENCY:-1}"
if [[ -z $text ]]; then exit "$status"; fi
run text "$(share 0.25)" --text="$text" --policies="$policies"
run sweep "$(share 0.25)" --text="$text" --windows=4 --sweep --policies=full+full
exit "$status"
