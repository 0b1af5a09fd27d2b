#!/usr/bin/env bash
# Format and clang-tidy over the C++ files that differ from BASE (BASE=all: every file). Needs a
# configured build folder, whose generated headers the files include.
set -euo pipefail
cd "$(dirname "$0")/../.."

base=${BASE:-HEAD}
list() {
  if [[ $base == all ]]; then
    git ls-files "$@"
  else
    git diff --name-only --diff-filter=d "$base" -- "$@"
    git ls-files --others --exclude-standard -- "$@"
  fi
}

mapfile -t formatted < <(list '*.cc' '*.h' '*.cu' '*.cuh')
mapfile -t tidied < <(list '*.cc' | grep -Ev '^(tests/fuzz|kernels/cuda)/' || true)
if [[ ${#formatted[@]} -gt 0 ]]; then clang-format --dry-run --Werror "${formatted[@]}"; fi
if [[ ${#tidied[@]} -gt 0 ]]; then
  cmake --build build --target es_proto
  printf '%s\n' "${tidied[@]}" | xargs -P "${JOBS:-$(nproc)}" -n 1 clang-tidy -p build --quiet
fi
echo "lint: ${#formatted[@]} files formatted, ${#tidied[@]} checked"
