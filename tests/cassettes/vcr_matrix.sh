#!/usr/bin/env bash
# What stands beside vcrpy (its files, its tests served by us) on the oldest vcrpy that is supported and on the newest, each in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep -v '^vcrpy==' constraints.txt > "$work/constraints.txt"
for vcrpy in 'vcrpy==9.0.*' 'vcrpy'; do
  "$PYTHON" -m venv --clear "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$work/constraints.txt" \
    . "$vcrpy" pytest pytest-asyncio pytest-recording hypothesis httpx requests
  echo "vcrpy $("$work/venv/bin/python" -c 'import importlib.metadata as m; print(m.version("vcrpy"))')"
  "$work/venv/bin/python" -m pytest -q -p no:cacheprovider \
    tests/cassettes/test_layouts.py tests/cassettes/test_foreign.py tests/testing/test_pytest_plugin.py
done
