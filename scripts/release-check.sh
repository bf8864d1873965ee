#!/usr/bin/env bash
# What a release is made of, tried as those do who get it: builds the source distribution and the wheel, installs the
# wheel in an empty environment, and runs the demo and the tests of the source distribution with it.
#
#   scripts/release-check.sh [PYTEST ARGUMENT...]
#
# Works on what is committed, and leaves both files in dist/. Arguments choose fewer tests than all. `just
# release-check` installs the tools first.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
dist=$PWD/dist
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT

step() { echo "release-check: $* (${SECONDS} s)"; }
fail() {
  echo "error: $*" >&2
  exit 1
}
build() { # build SOURCE OUTPUT TARGET
  (cd "$1" && "$python" -m hatchling build --target "$3" --directory "$2" >/dev/null 2>&1) || fail "the $3 cannot be built"
}
install() { "$python" -m pip --python "$scratch/env/bin/python" install -qq --disable-pip-version-check "$@"; }

[ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed: a release is made from a commit"
version=$("$python" scripts/set-version.py)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

step "building version $version: from a clone, and from the source distribution with another umask"
(umask 0022 && git clone --quiet . "$scratch/clone")
build "$scratch/clone" "$scratch/first" sdist
build "$scratch/clone" "$scratch/first" wheel
sdist=sandbox_plugin-$version.tar.gz
wheel=sandbox_plugin-$version-py3-none-any.whl
(umask 0077 && tar -xzf "$scratch/first/$sdist" --no-same-permissions --touch -C "$scratch")
source=$scratch/sandbox_plugin-$version
build "$source" "$scratch/second" sdist
build "$source" "$scratch/second" wheel
for file in "$sdist" "$wheel"; do
  cmp --silent "$scratch/first/$file" "$scratch/second/$file" || fail "$file is not the same when it is built again"
done
mkdir -p "$dist"
cp "$scratch/first/$sdist" "$scratch/first/$wheel" "$dist"
(cd "$dist" && sha256sum "$sdist" "$wheel")

step "looking for a wheel of each package, for each Python and both architectures"
for supported in 3.11 3.12 3.13 3.14; do
  for machine in x86_64 aarch64; do
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
      --implementation cp --python-version $supported --platform manylinux2014_$machine \
      --platform manylinux_2_28_$machine --dest "$scratch/wheels" -r requirements/runtime.txt ||
      fail "the lock does not fit Python $supported on $machine"
  done
done

step "installing the wheel in an empty environment"
"$python" -m venv --without-pip "$scratch/env"
install --require-hashes --only-binary=:all: -r "$source/requirements/runtime.txt"
install --no-index --no-deps "$dist/$wheel"
"$python" -m pip --python "$scratch/env/bin/python" check
export PATH=$scratch/env/bin:$PATH
cd "$scratch"
[ "$(sandbox-plugin --version)" = "sandbox-plugin $version" ] || fail "it says that it is $(sandbox-plugin --version)"

step "running the demo with it"
sandbox-plugin demo </dev/null

step "running the tests of the source distribution with it"
install --require-hashes --only-binary=:all: -r "$source/requirements/dev.txt"
cd "$source"
# The program must not be found in the folder of the source, where pytest and `python -m` would look first.
export PYTHONSAFEPATH=1
found=$(python -c 'import sandbox_plugin; print(sandbox_plugin.__file__)')
case $found in
  "$scratch/env/"*) ;;
  *) fail "the tests would run with $found" ;;
esac
pytest -o pythonpath=tests/helpers -p no:cacheprovider -n 4 --dist worksteal "$@"
step "version $version can be released: $sdist and $wheel are in dist/"
