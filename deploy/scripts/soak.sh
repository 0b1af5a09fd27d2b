#!/usr/bin/env bash
# Runs every drill whole and prints what was measured, with the machine and the commit. It fails when a promise
# is broken; times are for people to judge. Runs from an unpacked archive (bin/soak) or from a checkout.
#   SECONDS_EACH   of load (default 60)
#   TIMES          how often the server is ended (default 20)
#   DRILLS         which ones (default: all)
#   BIN            folder of the programs (default: this script's in an archive, build/bin in a checkout)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
if [[ -x $here/drills ]]; then
  bin=${BIN:-$here}
  commit=$(sed -n 's/^Built from commit \([^,]*\),.*/\1/p' "$here/../README.md")
else
  bin=${BIN:-$here/../../build/bin}
  commit=$(git -C "$here" describe --always --dirty 2>/dev/null || true)
fi
[[ -x $bin/drills ]] || { echo "$bin/drills is missing: cmake --build build --target drills" >&2; exit 1; }

echo "machine  $(nproc) cores, $(grep -m1 '^model name' /proc/cpuinfo | cut -d: -f2- | xargs), load $(cut -d' ' -f1 /proc/loadavg)"
echo "commit   ${commit:-unknown}"
failed=0
for drill in ${DRILLS:-overload stalled terminate kill}; do
  "$bin/drills" "$drill" --seconds="${SECONDS_EACH:-60}" --times="${TIMES:-20}" || failed=1
done
exit $failed
