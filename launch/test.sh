#!/usr/bin/env bash
# Run the tests, after setting up. Arguments go to pytest: launch/test.sh tests/unit -k loss
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
(($#)) && exec python -m pytest "$@"

# Tests of functions use one core, and ranks wait for one another: both go on at once, and are shown from quick to slow.
functions=(tests/unit tests/fuzz) runs=()
for folder in tests/[a-z]*/; do
  [[ " ${functions[*]} " == *" ${folder%/} "* ]] || runs+=("$folder")
done
log=$(mktemp)
set -m # else the tests in the background, and what they start, would be deaf to SIGINT
python -m pytest "${runs[@]}" >"$log" 2>&1 &
background=$!
set +m
trap 'kill -INT "$background" 2>/dev/null || true; rm -f "$log"' EXIT
status=0
python -m pytest "${functions[@]}" || status=$?
wait "$background" || status=$?
cat "$log"
exit "$status"
