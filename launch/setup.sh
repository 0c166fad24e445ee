#!/usr/bin/env bash
# Make the environment of the project: .venv in the checkout, or $GRPO_DIST_VENV, with the pins of constraints.txt, or $GRPO_DIST_PINS.
#
#     launch/setup.sh        by hand: prints the path of the environment
#     source launch/setup.sh from the scripts beside it: also puts the environment on PATH and sets $root and $venv
#
# A second call sees the stamp of the first and returns at once. Simultaneous calls wait for one another.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${GRPO_DIST_VENV:-$root/.venv}
mkdir -p "$(dirname "$venv")"
venv=$(cd "$(dirname "$venv")" && pwd -P)/$(basename "$venv")
pins=${GRPO_DIST_PINS:-constraints.txt}

die() {
  printf 'grpo_dist: error: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local name without_venv=
  for name in python3.13 python3.12 python3.11 python3.10 python3; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
    without_venv=$name
  done
  [[ -z $without_venv ]] ||
    die "$without_venv cannot make environments, its venv module is missing (Debian and Ubuntu: apt-get install python3-venv)"
  die "Python 3.10 or newer is needed, and none of python3.13, 3.12, 3.11, 3.10 and python3 on PATH is that"
}

# The checkout, Python and pins that the environment was made from.
fingerprint() {
  printf '%s\n' "$root"
  "$venv/bin/python" -V
  (cd "$root" && cksum "$pins" setup.cfg pyproject.toml)
}

is_current() {
  [[ -x $venv/bin/python && -f $venv/stamp && $(fingerprint) == "$(<"$venv/stamp")" ]]
}

# Its pip starts and is in this folder: false for incomplete, copied and moved environments.
is_complete() {
  [[ $("$venv/bin/pip" --version 2>/dev/null) == *" $venv/"* ]]
}

logged() {
  "$@" >>"$venv/setup.log" 2>&1 </dev/null && return
  tail -n 25 "$venv/setup.log" >&2
  die "setting up $venv failed (above: the end of $venv/setup.log); start it again to continue"
}

install() {
  local python
  if ! is_complete; then
    [[ ! -e $venv || -f $venv/setup.log || -z $(ls -A "$venv") ]] ||
      die "$venv has no working pip, and this script did not make it: move it away, or set GRPO_DIST_VENV to another path"
    python=$(find_python)
    printf 'grpo_dist: making an environment with %s in %s\n' "$("$python" -V)" "$venv" >&2
    rm -rf "$venv"
    mkdir "$venv"
    logged "$python" -m venv "$venv"
  fi
  rm -f "$venv/stamp"
  printf 'grpo_dist: installing what %s pins (some minutes, once; progress in %s)\n' "$pins" "$venv/setup.log" >&2
  cd "$root"
  local extras=test,lint,quantized
  if [[ $pins == constraints-lowest.txt ]]; then
    extras=test # what checks the code needs newer releases than the code does
    logged "$venv/bin/python" tests/lowest/torch_without_cuda.py "$(sed -n 's/^torch==//p' "$pins")"
  fi
  (
    # two environments of one checkout are made one after the other: both write the package's metadata into it
    if command -v flock >/dev/null; then flock 8 || true; fi # a folder on NFS cannot be locked
    logged "$venv/bin/python" -m pip install --disable-pip-version-check -c "$pins" -e ".[$extras]"
  ) 8<"$root"
  fingerprint >"$venv/stamp"
}

if ! is_current; then
  (
    if command -v flock >/dev/null; then flock 9; fi
    is_current || install
  ) 9>"$venv.lock"
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  printf 'grpo_dist: the environment is ready in %s\n' "$venv"
fi
