#!/usr/bin/env bash
# Builds the programs with a preset and copies what an image needs into DEST: bin/, and lib/ for
# shared libraries that no Debian package has (CUDA's). Fails when a program would miss a library.
#   stage_programs.sh cpu|cuda DEST
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ $# -eq 2 ]] || { echo "usage: stage_programs.sh cpu|cuda DEST" >&2; exit 2; }
preset=$1 dest=$2

case $preset in
  cpu) build=build cuda=OFF ;;
  cuda) build=build-cuda cuda=ON ;;
  *) echo "stage_programs.sh: unknown preset \"$preset\"" >&2; exit 2 ;;
esac
cmake --preset "$preset" -DENTROPYSERVE_TESTS=OFF -DENTROPYSERVE_CUDA=$cuda
cmake --build "$build" --parallel "${JOBS:-$(nproc)}" --target entropyserve entropyserve-client

mkdir -p "$dest/bin" "$dest/lib"
for program in entropyserve entropyserve-client; do
  install -s -m 755 "$build/bin/$program" "$dest/bin/"
  libraries=$(ldd "$dest/bin/$program")
  if grep -F 'not found' <<<"$libraries" | grep -vF libcuda.so; then
    echo "stage_programs.sh: $program misses the libraries above" >&2
    exit 1
  fi
  # Outside the system's folders: not from a package. The driver's libcuda comes from the host.
  awk '$3 ~ /^\// && $3 !~ /^\/(usr\/)?lib\// && $1 !~ /^libcuda\./ {print $1, $3}' <<<"$libraries" |
    while read -r name path; do cp -L "$path" "$dest/lib/$name"; done
done
if [[ $preset == cuda ]]; then
  # Loaded at run time, so that ldd does not name it.
  nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[^=]*=//p' "$build/CMakeCache.txt")
  cp -L "$(dirname "$(readlink -f "$nvcc")")"/../lib64/libcublasLt.so.[0-9][0-9] "$dest/lib/"
fi
