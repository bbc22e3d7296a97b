#!/usr/bin/env bash
# Make a virtual environment in DIR with the newest Python from 3.11 to 3.13 that can make one, or with
# Python VERSION: from the PATH, from pyenv, from uv; or with a PROGRAM, such as /opt/bin/python3.12.
# (3.11 gets megatron-core 0.16.1, 3.12 and 3.13 get 0.19.2.)
# usage: tools/make_venv.sh DIR [VERSION | PROGRAM]
set -euo pipefail
directory=$1
versions=${2:-3.13 3.12 3.11}
program=""
case ${2:-} in */* | python*) program=$2 ;; esac

# Asked, not trusted: a name on the PATH may be a wrapper around nothing.
version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

if [ -n "$program" ]; then
  versions=$(version_of "$program") || versions="nothing that runs"
  case $versions in
  3.11 | 3.12 | 3.13) ;;
  *)
    echo "$program is not a Python from 3.11 to 3.13 (it is ${versions:-another program})" >&2
    exit 1
    ;;
  esac
fi

# The programs that may be Python $1, one a line.
candidates() {
  if [ -n "$program" ]; then
    echo "$program"
    return
  fi
  printf '%s\n' "python$1" python3 python
  local pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}
  for python in "$pyenv/versions/$1".*/bin/python; do [ ! -x "$python" ] || echo "$python"; done
  if command -v uv >/dev/null; then uv python find --no-python-downloads "$1" 2>/dev/null || true; fi
}

without_venv=""
for version in $versions; do
  while read -r python; do
    found=$(version_of "$python") || continue
    [ "$found" = "$version" ] || continue
    if "$python" -c 'import ensurepip, venv' 2>/dev/null </dev/null; then
      echo "Python $version: making a virtual environment in $directory"
      # An interrupted one must not be taken for whole: make asks for its python, so that comes last.
      trap 'rm -rf "$directory"' INT TERM ERR
      "$python" -m venv --clear "$directory"
      exit 0
    fi
    without_venv=${without_venv:-$version}
  done < <(candidates "$version")
done

wanted="Python from 3.11 to 3.13" newest=3.13
[ -z "${2:-}" ] || { wanted="Python $2"; newest=$2; }
if [ -n "$without_venv" ]; then
  echo "Python $without_venv has no 'venv': install it (Debian, Ubuntu: apt-get install python$without_venv-venv)" >&2
elif present=$(version_of python3) || [ -n "${2:-}" ]; then
  # The distribution's python3 is another: installing that again would not help.
  echo "no $wanted was found on the PATH, in pyenv or by uv (python3 is ${present:-missing}): install one (Debian, Ubuntu: apt-get install python$newest python$newest-venv; \`pyenv install $newest\`; \`uv python install $newest\`; elsewhere: https://www.python.org/downloads)" >&2
else
  echo "no $wanted was found: install one (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
fi
exit 1
