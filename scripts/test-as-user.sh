#!/usr/bin/env bash
# The README's test command as most developers run it: in a fresh clone, as an ordinary user, with umask 0002.
#
#   scripts/test-as-user.sh [PYTEST ARGUMENT...]
#
# Runs as root, and the tests as `nobody`, with the first python3 on the PATH that `nobody` can run (Debian's is
# installed if there is none). What pip installs is fetched by root: where packages come from may be known only to
# root's pip. Nothing is left behind.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" != 0 ]; then
  echo "error: run it as root; an ordinary user runs the tests with: python3 scripts/dev.py test" >&2
  exit 1
fi

scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT

as_user() {
  setpriv --reuid=nobody --regid=nogroup --clear-groups \
    env HOME="$scratch/home" TMPDIR="$scratch/tmp" USER=nobody LOGNAME=nobody \
    PIP_NO_INDEX=1 PIP_FIND_LINKS="$scratch/wheels" "$@"
}

umask 0002
mkdir "$scratch"/{home,tmp,wheels}
git clone --quiet . "$scratch/clone"
chown -R nobody:nogroup "$scratch"

cd "$scratch/clone"
if ! as_user python3 -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "test-as-user: installing Debian's Python"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-pip >/dev/null
fi
python=$(as_user sh -c 'command -v python3')
"$python" -m pip download -qq --require-hashes --only-binary=:all: --dest "$scratch/wheels" -r requirements/dev.txt
as_user python3 scripts/dev.py test "$@"
