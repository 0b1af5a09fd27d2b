#!/usr/bin/env bash
# Runs every drill whole and prints what was measured, with the machine and the commit. It fails when a promise
# is broken; times are for people to judge. TIMES: how often the server is ended; SECONDS_EACH: of load.
set -euo pipefail
cd "$(dirname "$0")/../.."

drills=build/bin/drills
seconds_each=${SECONDS_EACH:-60}
times=${TIMES:-20}
[[ -x $drills ]] || { echo "$drills is missing: cmake --build build --target drills" >&2; exit 1; }

echo "machine  $(nproc) cores, $(grep -m1 '^model name' /proc/cpuinfo | cut -d: -f2- | xargs), load $(cut -d' ' -f1 /proc/loadavg)"
echo "commit   $(git describe --always --dirty 2>/dev/null || echo unknown)"
failed=0
"$drills" overload --seconds="$seconds_each" || failed=1
"$drills" stalled --seconds="$seconds_each" || failed=1
"$drills" terminate --times="$times" || failed=1
"$drills" kill --times="$times" || failed=1
exit $failed
