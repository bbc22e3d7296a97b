#!/usr/bin/env bash
# Wheels for a GPU machine without a network: Megatron-BTX, Megatron-Core and what else they need.
#
#   benchmarks/gpu_wheels.sh DIR            where there is a network: 27 MB
#   pip install --no-index --find-links DIR megatron-btx        on the machine
#
# For a machine that has Python 3.12, torch 2.11 and transformers: what these bring is left out, at
# whatever version it is there. TORCH=2.13.0 says another torch, PYTHON=3.13 another Python.
set -euo pipefail
if [ $# != 1 ]; then
  sed -n 's/^# \{0,1\}//p' "$0" | sed 1d >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$root/tools/make_venv.sh" "$work/venv" "${PYTHON:-3.12}"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
needs() { # REPORT REQUIREMENT...: what pip would install, and nothing else
  "${pip[@]}" install --quiet --dry-run --ignore-installed --constraint "$work/constraints" \
    --report "$1" "torch==${TORCH:-2.11.0}" "${@:2}"
}
grep -v -e '^torch==' -e '^transformers==' -e '^tokenizers==' "$root/constraints.txt" >"$work/constraints"
needs "$work/all.json" "$root[hf]"
needs "$work/there.json" transformers
"$work/venv/bin/python" - "$work/all.json" "$work/there.json" >"$work/lacking" <<'PYTHON'
import json, sys

all, there = (
    {each["metadata"]["name"]: each["metadata"]["version"] for each in json.load(open(path))["install"]}
    for path in sys.argv[1:]
)
for name in sorted(all.keys() - there.keys() - {"megatron-btx"}):
    print(f"{name}=={all[name]}")
PYTHON
"${pip[@]}" download --quiet --no-deps --dest "$out" --requirement "$work/lacking"
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$out" "$root"
ls -l "$out"
