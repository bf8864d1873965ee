#!/usr/bin/env bash
# Builds a small kernel with IOMMUFD and VFIO cdevs from Debian's linux-source-6.12, for `just test-vm-cdev`
# (docs/vm-test.md): no Debian kernel has them. It does nothing when source, configuration and compiler are those
# of the kernel that is there already. Root is needed only to install the build tools, where they are missing.
#
#   scripts/build-cdev-kernel.sh [--force]
#
# What it leaves in .cache/vm-cdev/kernel is laid out as Debian's package: boot/vmlinuz-*, lib/modules. The source tree
# (some 2 GB while it builds) is removed at the end. JOBS, default 2, is how many compilers run at once.
set -euo pipefail
cd "$(dirname "$0")/.."

package=linux-source-6.12
config=$PWD/tests/vm/cdev.config
work=$PWD/.cache/vm-cdev
kernel=$work/kernel
source=$work/source

case ${1:-} in
  "") ;;
  --force) rm -rf "$kernel" ;;
  *)
    echo "error: unknown argument $1 (--force is known)" >&2
    exit 2
    ;;
esac

missing=false
for tool in gcc make flex bison bc xz; do
  command -v "$tool" >/dev/null || missing=true
done
for header in libelf.h stdlib.h; do
  [ -e "/usr/include/$header" ] || missing=true
done
if $missing || ! apt-cache show "$package" >/dev/null 2>&1; then
  echo "build-cdev-kernel: installing the build tools and reading the package lists"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    gcc make libc6-dev libelf-dev flex bison bc xz-utils >/dev/null
fi

version=$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')
stamp="$package $version $(sha256sum <"$config" | cut -d' ' -f1) $(gcc -dumpfullversion)"
if [ -e "$kernel/stamp" ] && [ "$(cat "$kernel/stamp")" = "$stamp" ]; then
  echo "build-cdev-kernel: $(basename "$kernel"/boot/vmlinuz-*) is there already"
  exit 0
fi

started=$SECONDS
rm -rf "$kernel" "$source" "$work/package"
mkdir -p "$source" "$work/package"
(cd "$work/package" && apt-get download -qq "$package" && dpkg -x ./*.deb .)
tar -xf "$work/package/usr/src/$package.tar.xz" --strip-components=1 -C "$source"
rm -r "$work/package"

make -s -C "$source" KCONFIG_ALLCONFIG="$config" allnoconfig
# A line that Kconfig does not like it drops without a word.
while read -r line; do
  if ! grep -qxF "$line" "$source/.config"; then
    echo "error: the kernel's configuration has lost $line" >&2
    exit 1
  fi
done < <(grep '^CONFIG_\|^# CONFIG_.* is not set$' "$config")

echo "build-cdev-kernel: building $package $version; several minutes"
nice -n 15 make -s -C "$source" -j"${JOBS:-2}" bzImage modules
release=$(make -s -C "$source" kernelrelease)
mkdir -p "$kernel/boot" "$kernel/lib/modules/$release"
cp "$source/arch/x86/boot/bzImage" "$kernel/boot/vmlinuz-$release"
cp "$source/.config" "$kernel/boot/config-$release"
find "$source" -name '*.ko' -exec cp -t "$kernel/lib/modules/$release" {} +
rm -rf "$source"
echo "$stamp" >"$kernel/stamp"
echo "build-cdev-kernel: vmlinuz-$release built in $((SECONDS - started)) s"
