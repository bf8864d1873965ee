#!/usr/bin/env bash
# Builds the container image with buildah and tries it: needs no container engine, and with --debootstrap no
# registry either.
#
#   scripts/build-image.sh [--debootstrap] [--install-tools] [--arch ARCH] [--twice] [--tag NAME] [--label KEY=VALUE]...
#
#   --debootstrap     make the base image from Debian's packages (trixie) instead of pulling the Containerfile's
#   --install-tools   apt-get install buildah, crun, debootstrap and qemu-user-static where they are missing
#   --arch ARCH       amd64 or arm64; another than this machine's is emulated, which takes some 10 times as long
#   --twice           do all of it twice, and fail if the second image is not the first, to the bit
#   --tag NAME        default: sandbox-plugin:<version>
#   --label ...       a label more, such as org.opencontainers.image.source=https://...
#
# Runs as root (buildah's chroot isolation, debootstrap and apt-get all want it). PIP_INDEX_URL and PIP_CERT, where
# set, are used in the build as well. The time in the image is SOURCE_DATE_EPOCH, by default that of the last commit.
# Ends with 0 only when the image has been started and its program has answered. Its bill of materials is then in dist/.
set -euo pipefail
cd "$(dirname "$0")/.."

suite=trixie
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' sandbox_plugin/__init__.py)
tag=sandbox-plugin:$version
native=$(dpkg --print-architecture)
arch=$native
debootstrap=false
install_tools=false
twice=false
labels=()

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

while [ $# -gt 0 ]; do
  case $1 in
    --debootstrap) debootstrap=true ;;
    --install-tools) install_tools=true ;;
    --twice) twice=true ;;
    --arch | --tag | --label)
      [ $# -gt 1 ] || fail "$1 needs a value" 2
      case $1 in
        --arch) arch=$2 ;;
        --tag) tag=$2 ;;
        --label) labels+=(--label "$2") ;;
      esac
      shift
      ;;
    *) fail "unknown argument $1 (--debootstrap, --install-tools, --arch, --twice, --tag and --label are known)" 2 ;;
  esac
  shift
done
case $arch in
  amd64) machine=x86_64 ;;
  arm64) machine=aarch64 ;;
  *) fail "--arch is amd64 or arm64, not $arch" 2 ;;
esac
[ "$(id -u)" = 0 ] || fail "run it as root; without root, any container engine can build the Containerfile"

step() { echo "image: $* (${SECONDS} s)"; }

scratch=$(mktemp -d)
containers=()
base=
clean_up() {
  for container in "${containers[@]}"; do buildah rm "$container" >/dev/null || true; done
  if [ -n "$base" ]; then buildah rmi "$base" >/dev/null 2>&1 || true; fi
  rm -rf "$scratch"
}
trap clean_up EXIT

quietly() { # quietly COMMAND...: its output only if it fails
  "$@" >"$scratch/log" 2>&1 || { tail -n 40 "$scratch/log" >&2; return 1; }
}

get_tools() {
  local tool missing=() tools=(buildah crun)
  if $debootstrap; then tools+=(debootstrap); fi
  if [ "$arch" != "$native" ]; then tools+=(qemu-$machine-static); fi
  for tool in "${tools[@]}"; do
    command -v "$tool" >/dev/null || missing+=("${tool/qemu-$machine-static/qemu-user-static}")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    $install_tools || fail "not installed: ${missing[*]} (--install-tools takes them from Debian's packages)"
    step "installing ${missing[*]}"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
  fi
  # Where systemd runs, the package has done this.
  local binfmt=/proc/sys/fs/binfmt_misc
  if [ "$arch" != "$native" ] && [ ! -e $binfmt/qemu-$machine ]; then
    [ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
    cat /usr/lib/binfmt.d/qemu-$machine.conf >$binfmt/register
  fi
}

# As Debian's own slim images are made: no manuals and translations, but every copyright file; nothing of the machine
# or the day on which it was made; security updates are looked for.
slim() {
  local root=$1 mirror
  printf 'path-exclude /usr/share/%s/*\n' doc info locale man >"$root/etc/dpkg/dpkg.cfg.d/slim"
  echo 'path-include /usr/share/doc/*/copyright' >>"$root/etc/dpkg/dpkg.cfg.d/slim"
  find "$root"/usr/share/doc -type f ! -name copyright -delete
  rm -rf "$root"/usr/share/{info,locale,man}/* "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/{*.bin,archives/*.deb} \
    "$root"/var/log/* "$root"/var/cache/ldconfig/* "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old \
    "$root"/etc/{hostname,resolv.conf}
  sed -i -E "s/^([^:]*:[^:]*:)[0-9]+:/\1$((SOURCE_DATE_EPOCH / 86400)):/" "$root"/etc/shadow
  mirror=$(sed -n 's/^deb \([^ ]*\) .*/\1/p' "$root/etc/apt/sources.list")
  {
    echo "deb $mirror $suite main"
    echo "deb $mirror $suite-updates main"
    echo "deb $mirror-security $suite-security main"
  } >"$root/etc/apt/sources.list"
}

make_base() {
  base=localhost/debian-$suite-base-$arch
  step "making $base from Debian's packages"
  rm -rf "$scratch/root"
  quietly debootstrap --arch="$arch" --variant=minbase "$suite" "$scratch/root"
  slim "$scratch/root"
  local container
  container=$(buildah from --arch "$arch" scratch)
  containers+=("$container")
  buildah add --quiet "$container" "$scratch/root" / >/dev/null
  buildah config --arch "$arch" --cmd /bin/sh "$container"
  buildah commit --quiet --identity-label=false --timestamp "$SOURCE_DATE_EPOCH" "$container" "$base" >/dev/null
}

build() {
  local arguments=()
  if $debootstrap; then
    make_base
    arguments+=(--build-arg "BASE=$base" --pull-never)
  fi
  if [ -n "${PIP_INDEX_URL:-}" ]; then arguments+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"); fi
  if [ -n "${PIP_CERT:-}" ]; then
    arguments+=(--build-arg PIP_CERT=/run/pip-certificate.pem --volume "$PIP_CERT:/run/pip-certificate.pem:ro")
  fi
  if revision=$(git rev-parse HEAD 2>/dev/null); then
    arguments+=(--label "org.opencontainers.image.revision=$revision")
  fi
  step "building $tag for $arch"
  quietly buildah build --isolation chroot --file Containerfile --tag "$tag" --arch "$arch" \
    --timestamp "$SOURCE_DATE_EPOCH" --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" --identity-label=false \
    --label "org.opencontainers.image.created=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%FT%TZ)" \
    "${labels[@]}" "${arguments[@]}" .
  # The digest of the configuration, which names each layer by its own digest.
  built=$(buildah inspect --type image --format '{{.FromImageID}}' "$tag")
}

inside() { buildah run --isolation chroot "$container" -- "$@"; }
try() { echo "  \$ $*" && inside "$@" | sed 's/^/  /'; }

try_it() {
  step "trying $tag"
  container=$(buildah from --pull-never --arch "$arch" "$tag")
  containers+=("$container")
  try sandbox-plugin --version
  try nvidia-sandbox-device-plugin --version
  try sandbox-plugin list --fake-sysfs empty
  try sh -c 'sleep 0 && cat /etc/debian_version'
  echo "  the demo: devices, kubelet restarts, CDI specs"
  quietly inside sandbox-plugin demo
  echo "  the daemon becomes ready, says so to the probe, and ends on SIGTERM"
  # shellcheck disable=SC2016
  quietly inside timeout 300 sh -euc '
    mkdir -p /tmp/kubelet
    export SANDBOX_PLUGIN_STATUS_SOCKET=/tmp/status.sock
    sandbox-plugin run --fake-sysfs empty --kubelet-dir /tmp/kubelet --cdi-dir /tmp/cdi &
    until sandbox-plugin status --probe; do kill -0 $!; sleep 0.2; done
    kill $!
    wait $!'
  echo "  it holds no pip and no compiler, and its Python compiles nothing when it starts"
  # shellcheck disable=SC2016
  quietly inside sh -euc '
    for tool in pip pip3 gcc cc g++ c++ clang as ld make; do
      if command -v $tool; then exit 1; fi
    done
    if python3 -c "import pip"; then exit 1; fi
    python3 -v -m sandbox_plugin list --fake-sysfs empty >/tmp/imports 2>&1
    grep -q "^# code object from .*/sandbox_plugin/.*\.pyc.$" /tmp/imports
    if grep "^# code object from .*\.py.$" /tmp/imports; then exit 1; fi'
  local entrypoint
  entrypoint=$(buildah inspect --type image --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.Cmd}}' "$tag")
  [ "$entrypoint" = "[sandbox-plugin] []" ] ||
    fail "the image starts $entrypoint instead of sandbox-plugin with no arguments"
}

get_tools
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat --format=%Y pyproject.toml)}
export SOURCE_DATE_EPOCH
build
if $twice; then
  first=$built
  build
  [ "$first" = "$built" ] || fail "two builds are not the same: $first and $built"
  step "two builds gave the same image"
fi
try_it

bill=dist/sandbox-plugin-$version-$arch.cdx.json
mkdir -p dist
inside cat /opt/sandbox-plugin/share/sbom.cdx.json >"$bill"
step "$tag for $arch is ready, $(buildah images --format '{{.Size}}' "$tag"), its bill of materials is $bill"
echo "image: sha256:$built"
