#!/usr/bin/env bash
# Makes the locks requirements/*.txt from pyproject.toml: exact versions, and the hashes of every file of each
# release, so that one lock serves all supported Pythons. They name no index, so they work with any mirror.
#
#   build.txt    what builds the package (hatchling)
#   runtime.txt  what the program imports
#   dra.txt      the same, and what --dra imports: what is in the image
#   fuzz.txt     the program and the fuzzer
#   dev.txt      all of these, and the tools of the tests, lint and generators
#
# Versions stay as they are unless pyproject.toml asks for others; UPGRADE=1 takes the newest.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
oldest=3.11
if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$oldest" ]; then
  # A newer Python would leave out what only the oldest one needs.
  echo "error: make the locks with Python $oldest: remove .venv and run 'python$oldest scripts/dev.py setup' first" >&2
  exit 1
fi

compile() { # compile OUTPUT [pip-compile option ...]
  local output=$1
  shift
  echo "locking $output"
  # A pip configuration of this machine (mirrors, folders of wheels) must not decide what is in a lock.
  env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null CUSTOM_COMPILE_COMMAND="just lock" \
    "$python" -m piptools compile --quiet ${UPGRADE:+--upgrade} \
    --generate-hashes --allow-unsafe --strip-extras \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
    --output-file "$output" "$@" pyproject.toml
}

compile requirements/build.txt --all-build-deps --only-build-deps
compile requirements/runtime.txt
compile requirements/dra.txt --extra dra -c requirements/runtime.txt
compile requirements/fuzz.txt --extra fuzz -c requirements/runtime.txt
compile requirements/dev.txt --extra dev --extra dra --all-build-deps -c requirements/build.txt -c requirements/dra.txt
