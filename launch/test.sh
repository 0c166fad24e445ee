#!/usr/bin/env bash
# Run the tests, after setting up. Arguments go to pytest: launch/test.sh tests/unit -k loss
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
(($#)) && exec python -m pytest "$@"

# Tests of functions use one core, and ranks often wait: both run at the same time. Output is from quick to slow.
functions=(tests/unit tests/fuzz) runs=()
for folder in tests/[a-z]*/; do
  [[ " ${functions[*]} " == *" ${folder%/} "* ]] || runs+=("$folder")
done
log=$(mktemp)
set -m # otherwise the tests in the background and their processes would ignore SIGINT
python -m pytest "${runs[@]}" >"$log" 2>&1 &
background=$!
set +m
trap 'kill -INT "$background" 2>/dev/null || true; rm -f "$log"' EXIT
status=0
python -m pytest "${functions[@]}" || status=$?
wait "$background" || status=$?
cat "$log"
exit "$status"
