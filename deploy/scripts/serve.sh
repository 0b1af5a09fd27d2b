# shellcheck shell=bash
# Sourced by scripts that show or measure a server. `work`: a temporary folder that ends with the script.
#   find_cublaslt                 lets programs load cuBLASLt where the loader does not know it
#   start_server BIN LOG FLAG...  on a free loopback port, until the script ends; sets `address`
work=$(mktemp -d)
server=
# shellcheck disable=SC2317  # by the trap
finish() {
  if [[ -n $server ]]; then
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

# It is loaded by name; a toolkit or a Python package may have it.
find_cublaslt() {
  local library
  if ldconfig -p 2>/dev/null | grep -q 'libcublasLt\.so\.13'; then return; fi
  library=$(find -L /usr/local/cuda*/ /opt /usr/lib/python3* -name libcublasLt.so.13 2>/dev/null | head -n 1 || true)
  if [[ -n $library ]]; then export LD_LIBRARY_PATH=${library%/*}:${LD_LIBRARY_PATH:-}; fi
}

start_server() {
  local bin=$1 log=$2
  shift 2
  "$bin/entropyserve" --listen=127.0.0.1:0 --metrics-listen= --port-file="$work/port" "$@" 2>"$log" &
  server=$!
  # Listening is not ready: the weights are read after the port is known.
  until grep -qs ' ready\b' "$log"; do
    if ! kill -0 "$server" 2>/dev/null; then
      cat "$log" >&2
      echo "${0##*/}: the server did not start" >&2
      exit 1
    fi
    sleep 0.1
  done
  # shellcheck disable=SC2034  # for the script that sources this
  address=127.0.0.1:$(cat "$work/port")
}
