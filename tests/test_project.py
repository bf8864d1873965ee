"""What a checkout promises before any code of it runs: the locks, the built package, and scripts/dev.py.

The script is tried in a checkout of its own, with a stand-in for pip that only writes down what it is asked
for: what is installed is the locks' business, and CI's.
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
LOCKS = [f"requirements/{name}.txt" for name in ("build", "runtime", "dev", "fuzz")]

Lock = dict[str, tuple[str, frozenset[str]]]


def read_lock(path: str) -> Lock:
    """Package name -> its version and the hashes of its files."""
    text = re.sub(r"#.*", "", (ROOT / path).read_text()).replace("\\\n", " ")
    lock: Lock = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pin, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(pin)
        (exactly,) = requirement.specifier
        assert exactly.operator == "==", line
        assert requirement.url is None, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), line
        lock[canonicalize_name(requirement.name)] = (exactly.version, frozenset(hashes))
    return lock


@pytest.mark.parametrize("path", LOCKS)
def test_a_lock_has_a_hash_for_every_package_and_names_no_place_to_get_it_from(path: str) -> None:
    lock = read_lock(path)
    assert lock
    assert all(hashes for _, hashes in lock.values())
    text = (ROOT / path).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-", re.sub(r"^\s*--hash=.*", "", text, flags=re.MULTILINE), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("held", "holder"), [("build", "dev"), ("runtime", "dev"), ("runtime", "fuzz")], ids=lambda name: name
)
def test_no_two_locks_hold_different_releases_of_the_program(held: str, holder: str) -> None:
    assert read_lock(f"requirements/{held}.txt").items() <= read_lock(f"requirements/{holder}.txt").items()


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("requirements/build.txt", PROJECT["build-system"]["requires"]),
        ("requirements/runtime.txt", PROJECT["project"]["dependencies"]),
        ("requirements/dev.txt", PROJECT["project"]["optional-dependencies"]["dev"]),
        ("requirements/fuzz.txt", PROJECT["project"]["optional-dependencies"]["fuzz"]),
    ],
)
def test_a_lock_is_not_older_than_what_pyproject_asks_for(path: str, wanted: list[str]) -> None:
    lock = read_lock(path)
    for requirement in map(Requirement, wanted):
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_ci_runs_the_two_commands_of_the_readme_word_for_word() -> None:
    commands = re.findall(r"^ {4}(python3 .+)$", (ROOT / "README.md").read_text(), re.MULTILINE)[:2]
    assert [command.split()[-1] for command in commands] == ["demo", "test"]
    lines = [line.removesuffix(" </dev/null").strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert set(commands) <= set(lines)


def test_slow_tests_are_left_out_unless_they_are_asked_for() -> None:
    def collected(*flags: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *flags, "tests/test_pods.py"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=50)
        return [line for line in done.stdout.splitlines() if "::" in line]

    slow, others = collected("-m", "slow"), collected()
    assert "a_minute_after_its_pod" in "".join(slow)
    assert others
    assert not set(slow) & set(others)


UNPROMISED = {"grpclib", "betterproto", "watchfiles"}
"""Libraries of which a name is used that they do not promise (pyproject.toml says which)."""


def test_every_dependency_has_a_lower_bound_and_those_we_lean_on_too_much_an_upper_one() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in map(Requirement, [entry for group in groups for entry in group]):
        bounds = sorted(bound.operator for bound in requirement.specifier)
        assert bounds == (["<", ">="] if requirement.name in UNPROMISED else [">="]), requirement


def test_the_wheel_holds_the_program_its_data_and_its_licence_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=50)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"sandbox_plugin-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = f"sandbox_plugin-{__version__}.dist-info"
        entry_points = archive.read(f"{information}/entry_points.txt").decode()
    assert "sandbox-plugin = sandbox_plugin.cli.main:main" in entry_points
    assert f"{information}/licenses/LICENSE" in names
    files = [path.relative_to(ROOT) for path in (ROOT / "sandbox_plugin").rglob("*") if path.is_file()]
    left_behind = {path for path in files if path.suffix == ".pyc" or any(p.startswith(".") for p in path.parts)}
    sources = {str(path) for path in files if path not in left_behind}
    assert {"sandbox_plugin/py.typed", "sandbox_plugin/__main__.py"} <= sources
    assert any(name.startswith("sandbox_plugin/inventory/") and name.endswith(".tsv") for name in sources)
    assert {name for name in names if not name.startswith(information)} == sources


PIP = """
import json, sys
from pathlib import Path
if "--version" in sys.argv:
    print("pip 99.0 from nowhere (python 3)")
    sys.exit()
with open("calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if Path("wait").exists():
    open("wait").read()  # a FIFO: until somebody has opened it for writing and closed it again
sys.exit(1 if Path("broken").exists() else 0)
"""


class Checkout:
    """A small checkout with the real scripts/dev.py, and a stand-in for pip in the folder it is run from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir(parents=True)
        (root / "requirements").mkdir()
        (root / "pip").mkdir()
        shutil.copy(ROOT / "scripts/dev.py", root / "scripts/dev.py")
        shutil.copy(ROOT / "pyproject.toml", root / "pyproject.toml")
        (root / "pip/__init__.py").touch()
        (root / "pip/__main__.py").write_text(PIP)
        for lock in LOCKS:
            (root / lock).write_text("a==1\n")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.root / "scripts/dev.py"), *arguments]

    def setup(self) -> subprocess.CompletedProcess[str]:
        command = self.command("setup")
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    def demo(self) -> subprocess.CompletedProcess[str]:
        command = self.command("demo", "an argument")
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    def installed(self) -> list[str]:
        """What pip has been asked for since the last time, each by its last argument."""
        calls = self.root / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return [json.loads(line)[-1] for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "check out")


def test_setup_installs_the_tools_lock_by_hash_and_then_the_project_from_here(checkout: Checkout) -> None:
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    lock, project = map(json.loads, (checkout.root / "calls").read_text().splitlines())
    assert lock[0] == "--python"
    assert Path(lock[1]).is_relative_to(checkout.root / ".venv")
    assert {"install", "--require-hashes", "--only-binary=:all:"} <= set(lock)
    assert lock[-2:] == ["-r", "requirements/dev.txt"]
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(project)
    assert project[-2:] == ["-e", "."]


def test_a_second_setup_installs_nothing_and_says_nothing(checkout: Checkout) -> None:
    checkout.setup()
    checkout.installed()
    again = checkout.setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert checkout.installed() == []


def test_the_demo_needs_only_the_programs_locks_and_gets_its_arguments(checkout: Checkout) -> None:
    checkout.demo()  # ends in an error: the stand-in for pip made no sandbox-plugin
    assert checkout.installed() == ["requirements/runtime.txt", "requirements/build.txt", "."]
    program = checkout.root / ".venv/bin/sandbox-plugin"
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    program.chmod(0o755)
    assert checkout.demo().stdout == "<demo><an argument>"


def test_the_demo_is_content_with_the_tools_and_the_tools_are_added_to_the_demo(checkout: Checkout) -> None:
    checkout.demo()
    checkout.installed()
    checkout.setup()
    assert checkout.installed() == ["requirements/dev.txt"]
    checkout.demo()
    assert checkout.installed() == []


def test_a_changed_lock_starts_from_an_empty_environment(checkout: Checkout) -> None:
    checkout.setup()
    left_over = checkout.root / ".venv/lib/left-over"
    left_over.touch()
    (checkout.root / "requirements/dev.txt").write_text("a==2\n")
    checkout.installed()
    assert checkout.setup().returncode == 0
    assert checkout.installed() == ["requirements/dev.txt", "."]
    assert not left_over.exists()


def test_a_changed_linter_setting_installs_nothing_but_a_changed_entry_point_does(checkout: Checkout) -> None:
    checkout.setup()
    checkout.installed()
    replace_in(checkout.root / "pyproject.toml", "line-length = 120", "line-length = 99")
    checkout.setup()
    assert checkout.installed() == []
    replace_in(checkout.root / "pyproject.toml", '"sandbox_plugin.cli.main:main"', '"other:main"')
    checkout.setup()
    assert checkout.installed() == ["."]


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_failed_installation_is_one_line_and_is_tried_again(checkout: Checkout) -> None:
    (checkout.root / "broken").touch()
    failed = checkout.setup()
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("dev: error: pip could not install requirements/dev.txt")
    (checkout.root / "broken").unlink()
    checkout.installed()
    assert checkout.setup().returncode == 0
    assert checkout.installed() == ["requirements/dev.txt", "."]


def test_an_environment_that_somebody_else_made_is_refused_and_left_alone(checkout: Checkout) -> None:
    theirs = checkout.root / ".venv/theirs"
    theirs.parent.mkdir()
    theirs.touch()
    refused = checkout.setup()
    assert refused.returncode == 1
    assert "was not made by this script" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert theirs.exists()


def test_of_two_setups_at_once_the_second_waits_and_finds_the_work_done(checkout: Checkout) -> None:
    os.mkfifo(checkout.root / "wait")
    with subprocess.Popen(checkout.command("setup"), stderr=subprocess.PIPE, text=True) as first:
        held = os.open(checkout.root / "wait", os.O_WRONLY)  # opens when the first one's pip is at work
        with subprocess.Popen(checkout.command("setup"), stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr
            assert "waiting for another setup" in second.stderr.readline()
            (checkout.root / "wait").unlink()
            os.close(held)
            assert second.communicate(timeout=30)[1] == ""
        first.communicate(timeout=30)
    assert [first.returncode, second.returncode] == [0, 0]
    assert checkout.installed() == ["requirements/dev.txt", "."]


def test_called_by_the_environments_own_python_it_can_still_replace_the_environment(
    checkout: Checkout,
) -> None:
    checkout.setup()
    (checkout.root / "requirements/dev.txt").write_text("a==2\n")
    checkout.installed()
    python = str(checkout.root / ".venv/bin/python")
    command = [python, *checkout.command("setup")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    assert checkout.installed() == ["requirements/dev.txt", "."]
    assert Path(python).exists()


def test_without_a_command_it_explains_itself_and_a_wrong_command_is_an_error(checkout: Checkout) -> None:
    for arguments, status in ([], 0), (["help"], 0), (["tset"], 2):
        asked = subprocess.run(checkout.command(*arguments), capture_output=True, text=True, check=False, timeout=30)
        assert asked.returncode == status
        assert "scripts/dev.py demo" in asked.stdout
    assert checkout.installed() == []
