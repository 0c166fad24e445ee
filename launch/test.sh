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
exec python tests/side_by_side.py "${faults[@]}" -- "${runs[@]}" -- "${functions[@]}"
