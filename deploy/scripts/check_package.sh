#!/usr/bin/env bash
# Runs an archive of package.sh on a system that has nothing but Debian's base: help texts, a server with random
# weights, an answer over gRPC, the drills. Needs root and debootstrap.
#   check_package.sh ARCHIVE
#   ROOT   folder of the base system; made (about a minute) when it is not there, and kept
set -euo pipefail
[[ $# -eq 1 ]] || { echo "usage: check_package.sh ARCHIVE" >&2; exit 2; }
archive=$1
root=${ROOT:-/var/tmp/entropyserve-package-root}
[[ -x $root/bin/bash ]] || debootstrap --variant=minbase bookworm "$root"

rm -rf "$root/opt/entropyserve"
mkdir -p "$root/opt/entropyserve"
tar -C "$root/opt/entropyserve" --strip-components=1 -xJf "$archive"

# $ORIGIN in a library path is read from /proc. A mount namespace of its own leaves no mount behind.
env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin unshare --mount --pid --fork --mount-proc="$root/proc" \
  chroot "$root" /bin/bash -euo pipefail <<'END'
cd /opt/entropyserve
for program in bin/*; do
  case $program in */gpu_check | */load_gpu | */eval_gpu | */soak | *.sh | *.py) continue ;; esac
  if ldd "$program" | grep 'not found'; then
    echo "$program misses the libraries above" >&2
    exit 1
  fi
done
bin/entropyserve --help >/dev/null
bin/entropyserve-client --help >/dev/null
work=$(mktemp -d)
bin/entropyserve --model=synthetic:tiny --backend=cpu --listen=127.0.0.1:0 --metrics-listen=127.0.0.1:0 \
  --port-file="$work/port" 2>"$work/log" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true; rm -rf "$work"' EXIT
until grep -qs ' ready\b' "$work/log"; do
  kill -0 $server 2>/dev/null || { cat "$work/log" >&2; exit 1; }
  sleep 0.1
done
bin/entropyserve-client generate --server="127.0.0.1:$(cat "$work/port")" --temperature=0 --max-new-tokens=8 \
  --raw --json "What is a river?" >"$work/answer"
grep -q '"generated_tokens":"8"' "$work/answer" || { cat "$work/answer" >&2; exit 1; }
bin/policy_check share/golden/entropy_reference/short.safetensors
SECONDS_EACH=3 TIMES=1 bin/soak
END
echo "$archive runs on $(. "$root/etc/os-release" && echo "$PRETTY_NAME"), base system only"
