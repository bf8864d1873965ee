"""What the machine is made of: a Debian kernel with its modules, a Debian userland, and the installed package.

Everything comes from Debian's packages and from the checkout's .venv; nothing of it is installed on the host. A kernel
that was built here (scripts/build-cdev-kernel.sh) can take the place of Debian's.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from initrd import write_initrd

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).resolve().parent / "guest"

_KERNEL = "linux-image-cloud-amd64"
_USERLAND = [
    "busybox-static",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "libexpat1",
    "zlib1g",
    "libssl3",
    "libffi8",
    "libbz2-1.0",
    "liblzma5",
    "libuuid1",
]
_MODULES = ("virtio_pci", "vfio_pci", "vfio_iommu_type1", "aer_inject")
_DISTRIBUTIONS = ("sandbox-plugin", "grpcio", "protobuf", "pytest")
"""What runs in the guest: the package, and what plays the kubelet. What they need is taken along."""
_NOT_NEEDED = ("usr/share", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/python3.11/lib2to3")


def prepare(work: Path, own_kernel: Path | None = None) -> tuple[Path, Path]:
    """Returns the kernel and the initramfs. `work` keeps the downloads, so that the next time is quicker.

    `own_kernel`: a folder laid out as Debian's package, with boot/vmlinuz-* and lib/modules.
    """
    if sys.version_info[:2] != (3, 11):
        sys.exit("test-vm: the guest has Debian's Python 3.11, so .venv must be of that version too")
    kernel = own_kernel or unpack(work, "kernel", [_kernel_package()])
    userland = unpack(work, "userland", list(_USERLAND))
    for name in _NOT_NEEDED:
        shutil.rmtree(userland / name, ignore_errors=True)
    modules = fresh(work / "modules")
    take_modules(kernel / "lib/modules", modules)
    packages = fresh(work / "packages")
    take_packages(packages)
    tests = fresh(work / "tests")
    take_tests(tests)
    initrd = work / "initrd"
    trees = [(userland, ""), (modules, "modules"), (packages, "packages"), (tests, "tests"), (GUEST, "guest")]
    write_initrd(initrd, trees)
    return next((kernel / "boot").glob("vmlinuz-*")), initrd


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _kernel_package() -> str:
    """The package of the kernel itself: the other one only depends on the newest."""
    shown = subprocess.run(["apt-cache", "depends", _KERNEL], check=True, capture_output=True, text=True).stdout
    match = re.search(r"Depends: (linux-image-\S+)", shown)
    if match is None:
        sys.exit(f"test-vm: apt knows no {_KERNEL}: run apt-get update first")
    return match[1]


def unpack(work: Path, name: str, packages: list[str]) -> Path:
    """Downloads these packages, unless that was done before, and unpacks them into one folder."""
    folder, debs, done = work / name, work / f"{name}.debs", work / f"{name}.done"
    if done.exists() and done.read_text() == " ".join(packages):
        return folder
    done.unlink(missing_ok=True)
    fresh(folder)
    fresh(debs)
    subprocess.run(["apt-get", "download", "-q", *packages], check=True, cwd=debs)
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb, folder], check=True)
    shutil.rmtree(debs)
    done.write_text(" ".join(packages))
    return folder


def take_modules(source: Path, target: Path) -> None:
    """Copies the modules and what they need, and writes the order in which to insert them."""
    found = {_module_name(path): path for path in source.rglob("*.ko*")}
    order: list[str] = []

    def need(name: str) -> None:
        path = found.get(name)
        if path is None or name in order:
            return  # built in, or there already
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in (depends[1].decode() if depends else "").split(","):
            need(other.replace("-", "_"))
        (target / f"{name}.ko").write_bytes(content)
        order.append(name)

    for name in _MODULES:
        need(name)
    (target / "order").write_text("\n".join(order))


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def take_packages(target: Path) -> None:
    """Copies distributions out of .venv, and the project from its own wheel: what is tested is what is installed."""
    dist = fresh(target.parent / "dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(dist)]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    shutil.unpack_archive(wheel, target, "zip")
    done = {"sandbox-plugin"}
    waiting = list(_DISTRIBUTIONS)
    while waiting:
        found = distribution(waiting.pop())
        name = found.metadata["Name"].lower()
        if name not in done:
            done.add(name)
            _copy(found, target)
        waiting += [need for need in _needs(found) if need not in done]


def _needs(found: Distribution) -> list[str]:
    """Names of what a distribution needs, extras and what is not installed left out."""
    names = []
    for line in found.requires or ():
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^A-Za-z0-9._-]", requirement.strip())[0].lower()
        if "extra" in marker:
            continue
        try:
            distribution(name)
        except ModuleNotFoundError:
            continue
        names.append(name)
    return names


def _copy(found: Distribution, target: Path) -> None:
    for file in found.files or ():
        source = Path(str(file.locate()))
        if ".." in file.parts or "__pycache__" in file.parts or not source.is_file():
            continue
        destination = target / file
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)


def take_tests(target: Path) -> None:
    """The kubelet and the PodResources of the tests, and the gRPC code that they speak with, generated here."""
    sys.path.append(str(ROOT / "tests/helpers"))
    from wire import generate

    for name in ("kubelet.py", "pods.py"):
        shutil.copy(ROOT / "tests/helpers" / name, target)
    shutil.copy(Path(__file__).with_name("guest_wire.py"), target / "wire.py")
    generate(target)
