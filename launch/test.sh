#!/usr/bin/env bash
# Run the tests, after setting up. Arguments go to pytest: launch/test.sh tests/unit -k loss
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
(($#)) && exec python -m pytest "$@"

# Three processes at the same time, which take about as long. Tests of functions use one core. Ranks often wait, for each
# other and, where one has a fault, for time-outs: half of the functions follow the faults. Output is from quick to slow.
faults=(tests/fault tests/unit/rollout) functions=(tests/unit tests/fuzz --ignore=tests/unit/rollout) runs=()
for folder in tests/[a-z]*/; do
  [[ " ${functions[*]} ${faults[*]} " == *" ${folder%/} "* ]] || runs+=("$folder")
done
logs=$(mktemp -d)
set -m # otherwise the tests in the background and their processes would ignore SIGINT
python -m pytest "${faults[@]}" >"$logs/faults" 2>&1 &
background=($!)
python -m pytest "${runs[@]}" >"$logs/runs" 2>&1 &
background+=($!)
set +m
trap 'kill -INT "${background[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT
trap 'exit 130' INT # Ctrl-C ends the foreground's pytest first, with a status of its own
status=0
python -m pytest "${functions[@]}" || status=$?
for number in "${background[@]}"; do
  wait "$number" || status=$?
done
cat "$logs/faults" "$logs/runs"
exit "$status"
