#!/usr/bin/env bash
# Compile what tests import of an environment that was set up with PIP_NO_COMPILE=0: all but the libraries' own tests, the
# code of models, of which few are used, and libraries that tests hardly need. A second call finds it done.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# a few files are templates, which do not compile
python -m compileall -qq -x '/tests?/|/transformers/models/(?!auto/|qwen2/)|/torch/testing/|/(mypyc?|pip|matplotlib|fontTools)/' "$venv"/lib/python*/site-packages || true
