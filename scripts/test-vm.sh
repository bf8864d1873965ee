#!/usr/bin/env bash
# The daemon on a real kernel in QEMU (docs/vm-test.md). Root is needed only to install QEMU, if it is not there.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v qemu-system-x86_64 >/dev/null || ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
  echo "test-vm: installing QEMU and reading the package lists"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-system-x86 >/dev/null
fi
python3 scripts/dev.py setup
exec .venv/bin/python tests/vm/run.py "$@"
