#!/usr/bin/env python3
"""Writes a CycloneDX 1.6 bill of materials of the container image: its Python packages, what is compiled into them as
far as they say it themselves (PEP 770), and its Debian packages.

    scripts/make-sbom.py --python PYTHON --root DIR OUTPUT

The Python packages, their licences and what needs what are cyclonedx-py's work, which looks into the environment of
PYTHON. Debian's packages come from dpkg's status file below DIR. The same packages give the same bytes; the time in it
is SOURCE_DATE_EPOCH, or there is none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.utils import canonicalize_name

PROGRAM = "sandbox-plugin"
WHERE = "import sysconfig; print(sysconfig.get_path('purelib'))"
TAKEN = ("type", "name", "version", "description", "hashes", "licenses", "purl")
"""Of a component in a package's own bill."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the bill of materials of the container image.")
    parser.add_argument("--python", required=True, help="the Python whose environment holds the program")
    parser.add_argument("--root", required=True, type=Path, help="the root folder of the image")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    bill = python_packages(given.python)
    add_compiled_in(bill, given.python)
    packages = list(debian_packages(given.root))
    name_the_image(bill, packages)
    bill["components"] += packages
    text = json.dumps(bill, indent=1, sort_keys=True) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        print(f"error: not valid CycloneDX 1.6: {wrong}", file=sys.stderr)
        return 1
    given.output.write_text(text)
    print(f"{given.output}: {len(bill['components'])} components, {len(packages) - 1} of them Debian packages")
    return 0


def python_packages(python: str) -> dict[str, Any]:
    """What is installed for this Python. Raises CalledProcessError if it cannot be looked into; the tool says why."""
    # It is validated when it is complete.
    flags = ["--spec-version=1.6", "--output-reproducible", "--no-validate"]
    command = [sys.executable, "-m", "cyclonedx_py", "environment", *flags, python]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    bill: dict[str, Any] = json.loads(done.stdout)
    return bill


def add_compiled_in(bill: dict[str, Any], python: str) -> None:
    """Add what the bills inside the packages name, such as the Rust crates of a wheel, as needed by that package."""
    where = subprocess.run([python, "-c", WHERE], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    owners = {(canonicalize_name(each["name"]), each["version"]): each["bom-ref"] for each in bill["components"]}
    needs = {each["ref"]: each for each in bill["dependencies"]}
    known = set()
    for path in sorted(Path(where).glob("*.dist-info/sboms/*.cyclonedx.json")):
        name, _, version = path.parts[-3].removesuffix(".dist-info").partition("-")
        needed = needs[owners[canonicalize_name(name), version]].setdefault("dependsOn", [])
        for part in json.loads(path.read_text())["components"]:
            ref = part["purl"]
            needed.append(ref)
            if ref not in known:
                known.add(ref)
                bill["components"].append({"bom-ref": ref} | {key: part[key] for key in TAKEN if key in part})


def debian_packages(root: Path) -> Iterator[dict[str, Any]]:
    """The distribution itself, then each installed package, as scanners for vulnerabilities expect them."""
    lines = (root / "etc/os-release").read_text().replace('"', "").splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line)
    yield {
        "type": "operating-system",
        "bom-ref": release["ID"],
        "name": release["ID"],
        "version": release["VERSION_ID"],
        "description": release["PRETTY_NAME"],
    }
    for paragraph in (root / "var/lib/dpkg/status").read_text().strip().split("\n\n"):
        fields = HeaderParser().parsestr(paragraph)
        if fields["Status"].split()[2] != "installed":
            continue
        name, version = fields["Package"], fields["Version"]
        # "Source: glibc" or "Source: gcc-14 (14.2.0-19)"; Debian's security tracker goes by sources.
        source, _, differing = (fields["Source"] or name).partition(" ")
        purl = PackageURL(
            "deb",
            release["ID"],
            name,
            version,
            {
                "arch": fields["Architecture"],
                "distro": f"{release['ID']}-{release['VERSION_ID']}",
                "upstream": f"{source}@{differing.strip('()') or version}",
            },
        ).to_string()
        yield {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": version,
            "purl": purl,
            "description": fields["Description"].splitlines()[0],
            "supplier": {"name": fields["Maintainer"]},
        }


def name_the_image(bill: dict[str, Any], packages: list[dict[str, Any]]) -> None:
    """Say what the bill is of: the image, which is of the program's version and holds everything."""
    (program,) = (each for each in bill["components"] if each["name"] == PROGRAM)
    del program["externalReferences"]  # the folder in which its wheel was built
    held = [program["bom-ref"], *(package["bom-ref"] for package in packages)]
    image = {"type": "container", "bom-ref": "image", "name": PROGRAM, "version": program["version"]}
    bill["metadata"]["component"] = image
    bill["dependencies"].append({"ref": "image", "dependsOn": sorted(held)})


if __name__ == "__main__":
    sys.exit(main())
