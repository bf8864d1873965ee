#!/usr/bin/env bash
# Builds the container image with buildah and tries it: needs no container engine, and with --debootstrap no
# registry either.
#
#   scripts/build-image.sh [--debootstrap] [--install-tools] [--tag NAME]
#
#   --debootstrap     make the base image from Debian's packages (trixie) instead of pulling the Containerfile's
#   --install-tools   apt-get install buildah, crun and debootstrap where they are missing
#   --tag NAME        default: sandbox-plugin:<version>
#
# Runs as root (buildah's chroot isolation, debootstrap and apt-get all want it). PIP_INDEX_URL and PIP_CERT, where
# set, are used in the build as well. Ends with 0 only when the image has been started and its program has answered.
set -euo pipefail
cd "$(dirname "$0")/.."

suite=trixie
debootstrap=false
install_tools=false
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' sandbox_plugin/__init__.py)
tag=sandbox-plugin:$version

while [ $# -gt 0 ]; do
  case $1 in
    --debootstrap) debootstrap=true ;;
    --install-tools) install_tools=true ;;
    --tag)
      tag=${2:?--tag needs a name}
      shift
      ;;
    *)
      echo "error: unknown argument $1 (--debootstrap, --install-tools and --tag NAME are known)" >&2
      exit 2
      ;;
  esac
  shift
done

if [ "$(id -u)" != 0 ]; then
  echo "error: run it as root; without root, any container engine can build the Containerfile" >&2
  exit 1
fi

step() { echo "image: $* (${SECONDS} s)"; }

tools=(buildah crun)
if $debootstrap; then tools+=(debootstrap); fi
missing=()
for tool in "${tools[@]}"; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
if [ ${#missing[@]} -gt 0 ]; then
  if ! $install_tools; then
    echo "error: not installed: ${missing[*]} (--install-tools takes them from Debian's packages)" >&2
    exit 1
  fi
  step "installing ${missing[*]}"
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

scratch=$(mktemp -d)
containers=()
base=
clean_up() {
  for container in "${containers[@]}"; do buildah rm "$container" >/dev/null || true; done
  if [ -n "$base" ]; then buildah rmi "$base" >/dev/null 2>&1 || true; fi
  rm -rf "$scratch"
}
trap clean_up EXIT

# As in Debian's own slim images: no manuals and translations, but every copyright file.
slim() {
  printf 'path-exclude /usr/share/%s/*\n' doc info locale man >"$1/etc/dpkg/dpkg.cfg.d/slim"
  echo 'path-include /usr/share/doc/*/copyright' >>"$1/etc/dpkg/dpkg.cfg.d/slim"
  find "$1"/usr/share/doc -type f ! -name copyright -delete
  rm -rf "$1"/usr/share/{info,locale,man}/* "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/{*.bin,archives/*.deb}
}

arguments=()
if $debootstrap; then
  base=localhost/debian-$suite-base
  step "making $base from Debian's packages"
  debootstrap --variant=minbase "$suite" "$scratch/root" >"$scratch/log" 2>&1 || { tail -n 20 "$scratch/log" >&2; exit 1; }
  slim "$scratch/root"
  container=$(buildah from scratch)
  containers+=("$container")
  buildah add --quiet "$container" "$scratch/root" / >/dev/null
  buildah config --cmd /bin/sh "$container"
  buildah commit --quiet "$container" "$base" >/dev/null
  arguments+=(--build-arg "BASE=$base" --pull-never)
fi
if [ -n "${PIP_INDEX_URL:-}" ]; then arguments+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"); fi
if [ -n "${PIP_CERT:-}" ]; then
  arguments+=(--build-arg PIP_CERT=/run/pip-certificate.pem --volume "$PIP_CERT:/run/pip-certificate.pem:ro")
fi

step "building $tag"
buildah build --isolation chroot --file Containerfile --tag "$tag" "${arguments[@]}" . >"$scratch/log" 2>&1 ||
  { tail -n 40 "$scratch/log" >&2; exit 1; }

step "trying $tag"
container=$(buildah from --pull-never "$tag")
containers+=("$container")
try() { echo "  \$ $*"; buildah run --isolation chroot "$container" -- "$@" | sed 's/^/  /'; }
try sandbox-plugin --version
try sandbox-plugin list --fake-sysfs empty
try sh -c 'sleep 0 && cat /etc/debian_version'
entrypoint=$(buildah inspect --type image --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.Cmd}}' "$tag")
if [ "$entrypoint" != "[sandbox-plugin] []" ]; then
  echo "error: the image starts $entrypoint instead of sandbox-plugin with no arguments" >&2
  exit 1
fi
size=$(buildah images --format '{{.Size}}' "$tag")
step "$tag is ready, $size"
