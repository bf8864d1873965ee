#!/usr/bin/env python3
"""Pins the base image in the Containerfile to the digest that its tag has now. Needs skopeo, and asks the registry.

    scripts/pin-base.py              the tag that is there already
    scripts/pin-base.py IMAGE:TAG    another one

The digest is that of the list of images; fails if that does not hold each architecture that this image is built for.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

CONTAINERFILE = Path(__file__).resolve().parent.parent / "Containerfile"
PIN = re.compile(r"^ARG BASE=(?P<image>[^@\s]+)@(?P<digest>sha256:[0-9a-f]{64})$", re.MULTILINE)
ARCHITECTURES = {"amd64", "arm64"}


def main() -> int:
    text = CONTAINERFILE.read_text()
    old = PIN.search(text)
    assert old is not None, "the Containerfile has no line ARG BASE=IMAGE:TAG@sha256:..."
    parser = argparse.ArgumentParser(description="Pin the base image to the digest that its tag has now.")
    parser.add_argument("image", nargs="?", default=old["image"], help=f"default: {old['image']}")
    image: str = parser.parse_args().image
    try:
        done = subprocess.run(["skopeo", "inspect", "--raw", f"docker://{image}"], check=True, stdout=subprocess.PIPE)
    except FileNotFoundError:
        print("error: skopeo is not installed; Debian's package has this name", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        return 1  # skopeo has said why
    images = json.loads(done.stdout).get("manifests", [])
    missing = ARCHITECTURES - {each["platform"]["architecture"] for each in images}
    if missing:
        print(f"error: {image} is not there for {' and '.join(sorted(missing))}", file=sys.stderr)
        return 1
    digest = f"sha256:{hashlib.sha256(done.stdout).hexdigest()}"
    CONTAINERFILE.write_text(text[: old.start()] + f"ARG BASE={image}@{digest}" + text[old.end() :])
    print(f"{image} is {digest}" + (", as before" if old.groups() == (image, digest) else f"; it was {old['digest']}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
