#!/usr/bin/env bash
# Run the tests, after setting up. Arguments go to pytest: launch/test.sh tests/unit -k loss
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec python -m pytest "$@"
