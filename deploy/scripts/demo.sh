#!/usr/bin/env bash
# Starts the server on a free loopback port, asks a question about a long document, streams the
# answer with progress and receipt, stops the server. Programs come from build/bin.
#   MODEL     a GGUF file or a Hugging Face folder; empty: SmolLM2-135M-Instruct is fetched
#   DOCUMENT  a text file
#   QUESTION  about it
#   FLAGS     of entropyserve-client generate. The defaults lower what is always read and kept, so
#             that the method has something to skip in a document of 7 500 tokens
set -euo pipefail
cd "$(dirname "$0")/../.."

model=${MODEL:-}
document=${DOCUMENT:-/usr/share/common-licenses/GPL-3}
question=${QUESTION:-Summarize this license in one paragraph.}
read -r -a flags <<<"${FLAGS:---prefill-dense-prefix=1024 --prefill-base=1024 --kv-budget=1024}"
if [[ -z $model ]]; then model=$(deploy/scripts/fetch_demo_model.sh); fi

# shellcheck source=deploy/scripts/serve.sh
. deploy/scripts/serve.sh
start_server build/bin "$work/log" --model="$model"

echo "Document: $document ($(wc -c <"$document") bytes)"
echo "Question: $question"
echo "Flags:    ${flags[*]}"
echo
build/bin/entropyserve-client generate --server="$address" \
  --file="$document" --progress=on --temperature=0 --max-new-tokens=128 \
  "${flags[@]}" "$question"
