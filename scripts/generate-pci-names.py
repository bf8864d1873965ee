#!/usr/bin/env python3
"""Makes sandbox_plugin/inventory/pci_names.tsv, names of GPUs and NICs in pci.ids, from Debian's package `pci.ids`.

    scripts/generate-pci-names.py             fetch the newest package with apt (nothing is installed; no root needed)
    scripts/generate-pci-names.py FILE        use this pci.ids instead, plain or .gz

Standard library only. The package is taken from Debian's newest suite at the mirror that this machine's apt already
uses, since the database of a stable release is as old as the release.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "sandbox_plugin" / "inventory" / "pci_names.tsv"
NVIDIA, AMD, MELLANOX, INTEL = "10de", "1002", "15b3", "8086"
GPUS_AND_NICS = (
    r"graphics|\barc\b|\biris\b|\bgpu\b|flex|ponte|gaudi|\bnpu\b|\bvpu\b|\bxe\b|accelerator|fpga|\bqat\b|quickassist"
    r"|ethernet|network|wi-?fi|wireless|omni-path|\bipu\b|infrastructure processing"
)
"""What display, accelerator and network functions of Intel have in their names: pci.ids tells no classes, and five of
six of Intel's devices are chipsets. Of the other vendors every device is taken."""
LICENCE = (
    "This file can be distributed under either the GNU General Public License",
    "(version 2 or higher) or the 3-clause BSD License.",
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the table of model names again from pci.ids.")
    parser.add_argument("file", nargs="?", type=Path, help="a pci.ids; without it Debian's newest is fetched with apt")
    file: Path | None = parser.parse_args().file
    if file is not None:
        text = read(file)
    else:
        with tempfile.TemporaryDirectory() as folder:
            text = read(fetch(Path(folder)))
    table = extract(text)
    TABLE.write_text(table, encoding="utf-8")
    print(f"{TABLE.relative_to(ROOT)}: {table.count(chr(9))} devices, {table.splitlines()[0].removeprefix('# ')}")
    return 0


def read(file: Path) -> str:
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the package below `folder`; the machine's own package lists stay as they are."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    mirrors = subprocess.run(targets, check=True, capture_output=True, text=True).stdout.split()
    mirror = next((m for m in mirrors if m.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        sys.exit("generate-pci-names: apt knows no Debian mirror here: give a pci.ids file instead")
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    (folder / "sources.list").write_text(f"deb {mirror} sid main\n")
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-q", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    subprocess.run([*apt, "update"], check=True, cwd=folder)
    subprocess.run([*apt, "download", "pci.ids"], check=True, cwd=folder)
    (package,) = folder.glob("pci.ids_*.deb")
    subprocess.run(["dpkg", "-x", package, folder / "package"], check=True)
    return folder / "package/usr/share/misc/pci.ids"


def extract(text: str) -> str:
    """The table: where it comes from and its licence, then a line for each device: vendor and device ID, tab, name."""
    lines = text.splitlines()
    version, date = (
        next(line for line in lines if line.startswith(f"#\t{word}:")).split(":", 1)[1].strip()
        for word in ("Version", "Date")
    )
    if not all(f"#\t{line}" in lines for line in LICENCE):
        sys.exit("generate-pci-names: the licence in this pci.ids is another one than ours says: read it first")
    head = [f"pci.ids {version} ({date}), in part: NVIDIA, AMD (ATI), Mellanox, GPUs and NICs of Intel", *LICENCE]
    return "".join(f"# {line}\n" for line in head) + "".join(rows(lines))


def rows(lines: list[str]) -> list[str]:
    found: list[str] = []
    vendor = ""
    for line in lines:
        if line and line[0] not in "#\t":
            vendor = line[:4]
        elif vendor in (NVIDIA, AMD, MELLANOX, INTEL) and line.startswith("\t") and not line.startswith("\t\t"):
            device, _, name = line.strip().partition("  ")
            if vendor != INTEL or re.search(GPUS_AND_NICS, name, re.IGNORECASE):
                found.append(f"{vendor}{device}\t{name}\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
