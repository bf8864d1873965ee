"""What a checkout promises before any code of it runs: the locks, the built package, the layers, and scripts/dev.py.

The script is tried in a checkout of its own, with a stand-in for pip that only writes down what it is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sandbox_plugin import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WANTED = {
    "build": PROJECT["build-system"]["requires"],
    "runtime": PROJECT["project"]["dependencies"],
    **PROJECT["project"]["optional-dependencies"],
}
"""Lock, in requirements/ -> what pyproject.toml asks for."""


def read_lock(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Package -> its version and the hashes of its files. Fails for a line that is no pin with hashes."""
    text = re.sub(r"#.*", "", (ROOT / f"requirements/{name}.txt").read_text()).replace("\\\n", " ")
    lock: dict[str, tuple[str, frozenset[str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pin = re.fullmatch(r"([\w.-]+)==([\w.+!]+)((?:\s+--hash=sha256:[0-9a-f]{64})+)", line)
        assert pin is not None, f"names a place to get it from, or has no hash: {line}"
        lock[canonicalize_name(pin[1])] = (pin[2], frozenset(pin[3].split()))
    return lock


@pytest.mark.parametrize("name", WANTED)
def test_a_lock_has_hashes_names_no_host_and_is_not_older_than_what_pyproject_asks_for(name: str) -> None:
    lock = read_lock(name)
    assert "://" not in (ROOT / f"requirements/{name}.txt").read_text()
    for requirement in map(Requirement, WANTED[name]):
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


@pytest.mark.parametrize(
    ("held", "holder"),
    [
        *(("build", "dev"), ("runtime", "dra"), ("dra", "dev"), ("sbom", "dev")),
        *(("runtime", "sbom"), ("runtime", "fuzz")),
    ],
)
def test_no_two_locks_hold_different_releases_of_what_the_program_needs(held: str, holder: str) -> None:
    assert read_lock(held).items() <= read_lock(holder).items()


def test_the_wheel_holds_the_program_its_data_and_its_licence_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=50)
    information = f"sandbox_plugin-{__version__}.dist-info"
    with zipfile.ZipFile(tmp_path / f"sandbox_plugin-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        assert "sandbox-plugin = sandbox_plugin.cli.main:main" in wheel.read(f"{information}/entry_points.txt").decode()
    licences = {f"{information}/licenses/LICENSE", f"{information}/licenses/THIRD-PARTY-NOTICES.md"}
    assert {*licences, "sandbox_plugin/inventory/pci_names.tsv"} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "sandbox_plugin").rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(information)} == {
        source for source in sources if not source.endswith(".pyc")
    }


def test_an_import_from_a_higher_layer_breaks_the_contract(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "sandbox_plugin", tmp_path / "sandbox_plugin")
    with (tmp_path / "sandbox_plugin/names.py").open("a") as lower:
        lower.write("import sandbox_plugin.registry\n")
    program = str(Path(sys.executable).with_name("lint-imports"))
    done = subprocess.run(
        [program, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 1
    assert "sandbox_plugin.names is not allowed to import sandbox_plugin.registry" in done.stdout


PIP = """
import json, sys, time
from pathlib import Path
with open("calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
for lock, said in (("slow to fetch", "Collecting a==1"), ("slow to unpack", "Installing collected packages: a")):
    print(said, flush=True)
    while Path(lock).exists():
        time.sleep(0.01)
if Path("broken").exists():
    print("ERROR: No matching distribution\\nERROR: found for a==1", file=sys.stderr)
    sys.exit(1)
"""


class Checkout:
    """A small checkout with the real scripts/dev.py, and a stand-in for pip in the folder it is run from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("scripts", "requirements", "pip"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "scripts/dev.py", root / "scripts/dev.py")
        shutil.copy(ROOT / "pyproject.toml", root / "pyproject.toml")
        (root / "pip/__init__.py").touch()
        (root / "pip/__main__.py").write_text(PIP)
        for lock in WANTED:
            (root / f"requirements/{lock}.txt").write_text("a==1\n")

    def dev(self, *arguments: str, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
        command = [python, self.root / "scripts/dev.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """In which the stand-in is found: `python -m` looks into the folder it runs in first."""
        return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}

    def calls(self) -> list[list[str]]:
        """What pip has been asked for since the last time."""
        lines = (self.root / "calls").read_text().splitlines() if (self.root / "calls").exists() else []
        (self.root / "calls").unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def installed(self) -> list[str]:
        """The same, each by its last argument."""
        return [call[-1] for call in self.calls()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "check out")


def test_setup_installs_the_tools_by_hash_and_the_project_from_here_and_a_second_one_nothing(
    checkout: Checkout,
) -> None:
    assert checkout.dev("setup").returncode == 0
    lock, project = checkout.calls()
    assert lock[:2] == project[:2] == ["--python", str(checkout.root / ".venv/bin/python")]
    assert {"install", "--require-hashes", "--only-binary=:all:"} <= set(lock)
    assert lock[-2:] == ["-r", "requirements/dev.txt"]
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(project)
    assert project[-2:] == ["-e", "."]
    again = checkout.dev("setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert checkout.installed() == []


def test_the_demo_needs_only_the_programs_locks_to_which_the_tools_may_come(checkout: Checkout) -> None:
    checkout.dev("demo")  # ends in an error: the stand-in for pip made no sandbox-plugin
    assert checkout.installed() == ["requirements/dra.txt", "requirements/build.txt", "."]
    program = checkout.root / ".venv/bin/sandbox-plugin"
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    program.chmod(0o755)
    assert checkout.dev("demo", "an argument").stdout == "<demo><an argument>"
    checkout.dev("setup")
    assert checkout.installed() == ["requirements/dev.txt"]


def test_a_changed_lock_starts_from_an_empty_environment_even_if_its_own_python_calls(checkout: Checkout) -> None:
    checkout.dev("setup")
    left_over = checkout.root / ".venv/lib/left-over"
    left_over.touch()
    (checkout.root / "requirements/dev.txt").write_text("a==2\n")
    checkout.installed()
    assert checkout.dev("setup", python=checkout.root / ".venv/bin/python").returncode == 0
    assert checkout.installed() == ["requirements/dev.txt", "."]
    assert not left_over.exists()


def test_a_failed_installation_is_said_and_is_tried_again(checkout: Checkout) -> None:
    (checkout.root / "broken").touch()
    failed = checkout.dev("setup")
    assert failed.returncode == 1
    reason, last = failed.stderr.splitlines()[-3:-1], failed.stderr.splitlines()[-1]
    assert reason == ["ERROR: No matching distribution", "ERROR: found for a==1"]
    assert last.startswith("dev: error: pip could not install requirements/dev.txt")
    (checkout.root / "broken").unlink()
    checkout.installed()
    assert checkout.dev("setup").returncode == 0
    assert checkout.installed() == ["requirements/dev.txt", "."]


def test_a_long_installation_says_how_far_it_is(checkout: Checkout) -> None:
    script = checkout.root / "scripts/dev.py"
    script.write_text(script.read_text().replace("PATIENCE = 5.0", "PATIENCE = 0.05"))
    slow = [checkout.root / f"slow to {what}" for what in ("fetch", "unpack")]
    for lock in slow:
        lock.touch()
    command: list[str | Path] = [sys.executable, script, "setup"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=checkout.environment) as setup:
        assert setup.stderr is not None
        for lock, said in zip(slow, ("fetching: 1 of 1 packages", "unpacking: 0 packages are in .venv"), strict=True):
            assert any(said in line for line in setup.stderr)
            lock.unlink()
        setup.stderr.read()
    assert setup.returncode == 0


def test_an_environment_that_somebody_else_made_is_refused_and_left_alone(checkout: Checkout) -> None:
    theirs = checkout.root / ".venv/theirs"
    theirs.parent.mkdir()
    theirs.touch()
    refused = checkout.dev("setup")
    assert refused.returncode == 1
    assert "was not made by this script" in refused.stderr
    assert theirs.exists()
