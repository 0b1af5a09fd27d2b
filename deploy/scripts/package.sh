#!/usr/bin/env bash
# Builds the programs and packs them, with the shared libraries they load, into one archive that runs from any
# folder of another x86-64 Linux:
#   dist/entropyserve-VERSION-linux-x86_64.tar.xz, or ...-cpu.tar.xz
#   BACKEND   cuda or cpu; the default is cuda where nvcc is found
#   BUILD     the build folder, whose preset is BACKEND's
#   JOBS      parallelism
# Left to the target: the C and C++ runtimes (see $system), the NVIDIA driver and cuBLASLt. The archive is the same, bit
# for bit, when made again from the same commit on the same system.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -z ${BACKEND:-} ]]; then
  BACKEND=cpu
  if command -v nvcc >/dev/null; then BACKEND=cuda; fi
fi
programs=(entropyserve entropyserve-client drills policy_check engine_bench serving_bench policy_bench)
case $BACKEND in
  cpu) build=${BUILD:-build} preset=cpu cuda=OFF ;;
  cuda)
    build=${BUILD:-build-cuda} preset=cuda cuda=ON
    programs+=(cuda_ops_test model_test greedy_check kernel_bench prefill_attention_bench block_mass_bench)
    ;;
  *) echo "package.sh: BACKEND=$BACKEND is neither cpu nor cuda" >&2; exit 2 ;;
esac

version=$(sed -n 's/^project(entropyserve VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
[[ -n $version ]] || { echo "package.sh: CMakeLists.txt names no version" >&2; exit 1; }
name=entropyserve-$version-linux-$(uname -m)
if [[ $BACKEND == cpu ]]; then name+=-cpu; fi
# The C library, and the C++ runtime: every system with this C library or a later one has a C++ runtime of GCC 12 or
# later. OpenMP's runtime is not among them: few systems have it.
system='linux-vdso|ld-linux-x86-64|libc|libm|libdl|libpthread|librt|libresolv|libstdc[+][+]|libgcc_s|libcuda|libcublas|libcublasLt'

cmake --preset "$preset" -B "$build" -DENTROPYSERVE_CUDA=$cuda
cmake --build "$build" --parallel "${JOBS:-$(nproc)}" --target "${programs[@]}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/$name
mkdir -p "$root"/{bin,lib,share/golden,share/licenses}

# libraries PROGRAM: lines "NAME PATH" of what it loads and the target may lack.
libraries() {
  ldd "$1" | awk -v own="^($system)[.]so" '$2 == "=>" && $1 !~ own {print $1, $3}'
}

for program in "${programs[@]}"; do
  install -s -m 755 "$build/bin/$program" "$root/bin/"
  libraries "$root/bin/$program"
done | sort -u >"$work/libraries"
if grep -F ' not' "$work/libraries"; then
  echo "package.sh: the libraries above were not found" >&2
  exit 1
fi
while read -r library path; do
  install -m 644 "$path" "$root/lib/$library"
  strip --strip-unneeded "$root/lib/$library"
  patchelf --set-rpath '$ORIGIN' "$root/lib/$library"
done <"$work/libraries"
for program in "${programs[@]}"; do patchelf --set-rpath '$ORIGIN/../lib' "$root/bin/$program"; done

# Every library that is not the target's own must now come from the archive.
for file in "$root"/bin/* "$root"/lib/*; do
  if libraries "$file" | grep -vF " $root/"; then
    echo "package.sh: $(basename "$file") takes the above from this system" >&2
    exit 1
  fi
done

# Which Debian package each library is of, with its licence.
while read -r _ path; do
  path=$(readlink -f "$path")
  dpkg-query -S "$path" 2>/dev/null || dpkg-query -S "${path#/usr}"  # where /lib is a link, dpkg knows one of the two
done <"$work/libraries" | cut -d: -f1 | sort -u >"$work/packages"
while read -r package; do
  install -D -m 644 "/usr/share/doc/$package/copyright" "$root/share/licenses/$package/copyright"
  # shellcheck disable=SC2016  # dpkg's own variables
  dpkg-query -W -f '${binary:Package} ${Version}, source ${source:Package} ${source:Version}\n' "$package"
done <"$work/packages" >"$root/share/licenses/VERSIONS"

# The oldest runtimes that have all versions of symbols that the programs and libraries ask for.
newest() { objdump -T "$root"/bin/* "$root"/lib/* 2>/dev/null | grep -o "$1" | sort -Vu | tail -n 1; }
glibc=$(newest 'GLIBC_2\.[0-9]*') glibcxx=$(newest 'GLIBCXX_3\.4\.[0-9]*')

cp deploy/scripts/soak.sh "$root/bin/soak"
if [[ $BACKEND == cuda ]]; then
  cp deploy/scripts/gpu_check.sh "$root/bin/gpu_check"
  cp tests/bench/torch_attention_bench.py "$root/bin/"
fi
for script in load_gpu eval_gpu; do cp "deploy/scripts/$script.sh" "$root/bin/$script"; done
cp deploy/scripts/serve.sh "$root/bin/"
cp -r tests/golden/{models,policy,entropy_reference} "$root/share/golden/"
cp -r --parents proto/entropyserve "$root/share/"
cp LICENSE CHANGELOG.md "$root/"
commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
sed -e "s/@VERSION@/$version/" -e "s/@COMMIT@/$commit/" -e "s/@BACKEND@/$BACKEND/" -e "s/@GLIBC@/${glibc#GLIBC_}/" \
  -e "s/@GLIBCXX@/$glibcxx/" deploy/package/README.md >"$root/README.md"

mkdir -p dist
archive=dist/$name.tar.xz
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct 2>/dev/null || echo 0)" \
  -c "$name" | xz -T0 -6 >"$archive.part"
mv "$archive.part" "$archive"
echo "$archive: $(stat -c %s "$archive") bytes, $(wc -l <"$work/libraries") libraries, needs $glibc and $glibcxx"
