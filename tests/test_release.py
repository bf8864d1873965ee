"""What a release is made of: the version, the changelog, the notices, the bill of materials, the pinned base.

Whether sdist, wheel and image can be built, twice and the same, is shown by scripts/release-check.sh and
scripts/build-image.sh --twice in CI.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from datetime import UTC, date, datetime
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from sandbox_plugin import __version__

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str | Path, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "scripts" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=os.environ | env)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The parts of a checkout that are about a release, to be changed."""
    for folder in ("docs", "examples", "manifests", "requirements", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "sandbox_plugin").mkdir()
    for file in ("sandbox_plugin/__init__.py", "CHANGELOG.md", "Containerfile", "README.md", "THIRD-PARTY-NOTICES.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


# The version


def test_every_copy_of_the_version_is_the_programs_own() -> None:
    said = run("set-version.py")
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "file",
    [
        "Containerfile",
        "README.md",
        "docs/vfio.md",
        "examples/overlay/kustomization.yaml",
        "manifests/base/kustomization.yaml",
    ],
)
def test_a_copy_that_was_left_behind_is_named(file: str, copy: Path) -> None:
    path = copy / file
    assert __version__ in path.read_text()
    path.write_text(path.read_text().replace(__version__, "0.0.1"))
    said = run("set-version.py", root=copy)
    assert said.returncode == 1
    assert said.stderr == f"error: another version than {__version__} is in {file}\n"


def test_a_new_version_is_written_everywhere_dated_at_its_release_and_followed_by_the_next(copy: Path) -> None:
    log = copy / "CHANGELOG.md"
    (copy / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0 (unreleased)\n\n- a line\n")
    assert run("set-version.py", "7.8.9rc1", root=copy).stdout == "7.8.9rc1\n"
    assert run("set-version.py", root=copy).stdout == "7.8.9rc1\n"
    assert "newTag: 7.8.9rc1\n" in (copy / "manifests/base/kustomization.yaml").read_text()
    assert log.read_text() == "# Changelog\n\n## 7.8.9rc1 (unreleased)\n\n- a line\n"
    before = datetime.now(UTC)
    assert run("set-version.py", "7.8.9", "--release", root=copy).returncode == 0
    days = {f"{day:%F}" for day in (before, datetime.now(UTC))}
    assert log.read_text() in {f"# Changelog\n\n## 7.8.9 ({day})\n\n- a line\n" for day in days}
    assert run("set-version.py", "7.9.0", root=copy).returncode == 0
    assert log.read_text().startswith("# Changelog\n\n## 7.9.0 (unreleased)\n\n## 7.8.9 (")


def test_what_is_no_version_is_refused_and_nothing_is_written(copy: Path) -> None:
    said = run("set-version.py", "v0.2", root=copy)
    assert said.returncode == 2
    assert "v0.2 is no version" in said.stderr
    assert run("set-version.py", root=copy).stdout == f"{__version__}\n"


def test_the_changelog_begins_with_this_version_and_everything_older_has_a_date() -> None:
    headings = re.findall(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(headings) == len(re.findall(r"^## ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    versions = [Version(version) for version, _ in headings]
    assert versions[0] == Version(__version__)
    assert versions == sorted(versions, reverse=True)
    days = [date.fromisoformat(day) for _, day in headings if day != "unreleased"]
    assert len(days) >= len(headings) - 1
    assert days == sorted(days, reverse=True)


# Third-party notices


def test_the_notices_are_what_the_lock_gives() -> None:
    said = run("generate-notices.py", "--check")
    assert (said.returncode, said.stderr) == (0, "")


def test_notices_of_another_lock_and_a_package_that_is_not_installed_are_said(copy: Path) -> None:
    lock = copy / "requirements/runtime.txt"
    kept = lock.read_text()
    lock.write_text(re.sub(r"(?ms)^h2==.*?(?=^\w)", "", kept))
    said = run("generate-notices.py", "--check", root=copy)
    assert (said.returncode, said.stderr) == (
        1,
        "THIRD-PARTY-NOTICES.md is not what the lock gives: run `just notices`\n",
    )
    assert run("generate-notices.py", root=copy).returncode == 0
    assert run("generate-notices.py", "--check", root=copy).returncode == 0
    assert "### h2" not in (copy / "THIRD-PARTY-NOTICES.md").read_text()
    lock.write_text(re.sub(r"(?m)^h2==\S+", "h2==0.0.1", kept))
    assert "0.0.1 in the lock" in run("generate-notices.py", root=copy).stderr
    lock.write_text("no-such-package==1 \\\n")
    assert "no-such-package is not installed" in run("generate-notices.py", root=copy).stderr


# The bill of materials

PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE))

STATUS = """\
Package: libexample1
Status: install ok installed
Maintainer: Somebody <somebody@example.org>
Architecture: arm64
Source: example (2:1.0~rc1-1)
Version: 2:1.0~rc1-1+b1
Description: an example
 of more than one line

Package: gone
Status: deinstall ok config-files
Maintainer: Somebody <somebody@example.org>
Architecture: arm64
Version: 1-1
Description: removed, but for its configuration

Package: base-files
Status: install ok installed
Maintainer: Somebody <somebody@example.org>
Architecture: all
Version: 13.8
Description: the base
"""


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the environment that the image has, as far as metadata goes, and of a small Debian."""
    environment = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    for name in ("sandbox-plugin", *PINS):
        (metadata,) = (file for file in distribution(name).files or [] if file.match("*.dist-info/METADATA"))
        folder = Path(str(metadata.locate())).parent
        shutil.copytree(folder, packages / folder.name)
    root = tmp_path_factory.mktemp("root")
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n\nID=debian\nVERSION_ID="13"\n')
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    given = ("--python", environment / "bin/python", "--root", root, root / "bill")
    said = run("make-sbom.py", *given, SOURCE_DATE_EPOCH="86400")
    assert said.returncode == 0, said.stderr
    return (root / "bill").read_text()


def test_the_bill_names_python_and_debian_packages_and_what_is_compiled_into_a_wheel(bill: str) -> None:
    read = json.loads(bill)
    parts: dict[str, Any] = {part["bom-ref"]: part for part in read["components"]}
    purls = {part["purl"] for part in parts.values() if "purl" in part}
    assert {purl.lower() for purl in purls if purl.startswith("pkg:pypi/")} == {
        f"pkg:pypi/{name}@{version}" for name, version in PINS.items()
    }
    distro = "distro=debian-13"
    assert {purl for purl in purls if purl.startswith("pkg:deb/")} == {
        f"pkg:deb/debian/libexample1@2:1.0~rc1-1%2Bb1?arch=arm64&{distro}&upstream=example%402:1.0~rc1-1",
        f"pkg:deb/debian/base-files@13.8?arch=all&{distro}&upstream=base-files%4013.8",
    }
    assert (parts["debian"]["type"], parts["debian"]["version"]) == ("operating-system", "13")
    needs = {each["ref"]: each.get("dependsOn", []) for each in read["dependencies"]}
    (watchfiles,) = (ref for ref, part in parts.items() if part["name"] == "watchfiles")
    assert any(need.startswith("pkg:cargo/notify@") for need in needs[watchfiles])
    assert needs.keys() | set().union(*needs.values()) <= parts.keys() | {"image"}


def test_the_bill_is_of_the_image_with_the_time_of_the_source_and_no_folder_of_this_machine(bill: str) -> None:
    metadata = json.loads(bill)["metadata"]
    image = metadata["component"]
    assert (image["type"], image["name"], image["version"]) == ("container", "sandbox-plugin", __version__)
    assert metadata["timestamp"] == "1970-01-02T00:00:00+00:00"
    assert str(ROOT) not in bill


# The Containerfile


def test_what_the_image_copies_is_let_through_and_there() -> None:
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert len(copied) > 5
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in let_through), source


SKOPEO = """#!/bin/sh
echo "$@" >"$ASKED"
printf '%s' "$ANSWER"
"""
OF_TWO = json.dumps({"manifests": [{"platform": {"architecture": name}} for name in ("amd64", "arm64", "unknown")]})


@pytest.mark.parametrize(("given", "image"), [([], "debian:trixie-slim"), (["debian:forky"], "debian:forky")])
def test_pinning_the_base_writes_the_digest_of_the_list_that_the_tag_names_now(
    given: list[str], image: str, copy: Path, tmp_path: Path
) -> None:
    env = _skopeo(tmp_path, OF_TWO)
    digest = f"sha256:{hashlib.sha256(OF_TWO.encode()).hexdigest()}"
    done = run("pin-base.py", *given, root=copy, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{image} is {digest}; it was sha256:")
    assert (tmp_path / "asked").read_text() == f"inspect --raw docker://{image}\n"
    lines = (copy / "Containerfile").read_text().splitlines()
    assert f"ARG BASE={image}@{digest}" in lines
    assert len(lines) == len((ROOT / "Containerfile").read_text().splitlines())
    assert run("pin-base.py", *given, root=copy, **env).stdout == f"{image} is {digest}, as before\n"


@pytest.mark.parametrize(
    "answer", [OF_TWO.replace("arm64", "s390x"), json.dumps({"config": {}})], ids=["not for arm64", "one image"]
)
def test_a_base_that_is_not_there_for_both_architectures_is_not_pinned(answer: str, copy: Path, tmp_path: Path) -> None:
    done = run("pin-base.py", root=copy, **_skopeo(tmp_path, answer))
    assert done.returncode == 1
    assert re.search(r"^error: debian:trixie-slim is not there for .*arm64$", done.stderr)
    assert (copy / "Containerfile").read_text() == (ROOT / "Containerfile").read_text()


def _skopeo(folder: Path, answer: str) -> dict[str, str]:
    """The environment in which a stand-in for skopeo gives this answer."""
    (folder / "bin").mkdir()
    (folder / "bin/skopeo").write_text(SKOPEO)
    (folder / "bin/skopeo").chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ASKED": str(folder / "asked"), "ANSWER": answer}
