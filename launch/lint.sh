#!/usr/bin/env bash
# Check style, format, types and who imports whom, after setting up. launch/lint.sh --fix corrects what it can.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
if [[ ${1-} == --fix ]]; then
  ruff check --quiet --fix . || true
  ruff format --quiet .
fi
failed=0
ruff check . || failed=1
ruff format --check . || failed=1
mypy || failed=1
lint-imports --no-cache || failed=1
exit "$failed"
