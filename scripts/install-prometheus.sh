#!/usr/bin/env bash
# Installs prometheus and promtool from Debian's packages where they are missing. As root; starts no service.
#
#   scripts/install-prometheus.sh
set -euo pipefail

if command -v prometheus >/dev/null && command -v promtool >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
  echo "error: prometheus is missing: run this as root, or install it and promtool yourself" >&2
  exit 1
fi
# Without its service: a test starts a Prometheus of its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null
