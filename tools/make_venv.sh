#!/usr/bin/env bash
# Make a virtual environment in DIR with the newest Python from 3.10 to 3.13 that can make one.
# usage: tools/make_venv.sh DIR
set -euo pipefail
directory=$1

without_venv=""
for version in 3.13 3.12 3.11 3.10; do
  for python in "python$version" python3 python; do
    # Asked, not trusted: a name on the PATH may be a wrapper around nothing.
    found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    [ "$found" = "$version" ] || continue
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "Python $version: making a virtual environment in $directory"
      # An interrupted one must not be taken for whole: make asks for its python, so that comes last.
      trap 'rm -rf "$directory"' INT TERM ERR
      "$python" -m venv --clear "$directory"
      exit 0
    fi
    without_venv=${without_venv:-$version}
  done
done

if [ -n "$without_venv" ]; then
  echo "Python $without_venv has no 'venv': install it (Debian, Ubuntu: apt-get install python$without_venv-venv)" >&2
elif present=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
  # The distribution's python3 is another: installing that again would not help.
  echo "no Python from 3.10 to 3.13 was found (python3 is $present): install one (Debian, Ubuntu: apt-get install python3.13 python3.13-venv; elsewhere: https://www.python.org/downloads)" >&2
else
  echo "no Python from 3.10 to 3.13 was found: install one (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
fi
exit 1
