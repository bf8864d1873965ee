#!/usr/bin/env python3
"""All that a checkout needs, in one command, on a Linux machine with nothing but Python >= 3.11 and pip.

    python3 scripts/dev.py demo [ARGUMENT ...]   install what the program needs, then `sandbox-plugin demo`
    python3 scripts/dev.py test [ARGUMENT ...]   install the tools too, then every check and pytest
    python3 scripts/dev.py lint                  the same checks without pytest
    python3 scripts/dev.py fuzz-setup            install the tools and the fuzzer
    python3 scripts/dev.py setup                 only install the tools; `.venv/bin/just` lists the recipes

Everything goes into `.venv` in the checkout, at the exact versions of requirements/*.txt, verified by hash.
The virtual environment is made without a pip and filled by the machine's own (`pip --python`), so it works as
well where Debian keeps ensurepip in a package of its own and marks its Python as externally managed.

Standard library only. It stands apart from the package because it has to run before anything is installed,
and its syntax is old enough for an older Python to get as far as saying that it is too old.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OLDEST_PYTHON = (3, 11)
OLDEST_PIP = (22, 3)  # the first with `pip --python`

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STATE = VENV / "dev-state.json"
"""What has been installed, so that the next run need not ask; and the mark of an environment that is ours."""

LOCKS = {
    "program": ["requirements/runtime.txt", "requirements/build.txt"],
    "tools": ["requirements/dev.txt"],  # holds all of the program's at the same versions
    "fuzz": ["requirements/dev.txt", "requirements/fuzz.txt"],
}
CHECKS = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["lint-imports", "--no-logo"],
    ["python", "scripts/generate-api.py", "--check"],
]

PYTEST = ["pytest", "-n", "4", "--dist", "worksteal"]
"""Most tests wait for a process or a timer, so more run at a time than there are cores."""


class SetupError(Exception):
    """Something that a person has to put right. The message is one line."""


def say(text: str) -> None:
    print(f"dev: {text}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """For child processes: .venv first on the PATH, and nothing that leads Python or pip past .venv."""
    misleading = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    env = {name: value for name, value in os.environ.items() if name not in misleading}
    env["VIRTUAL_ENV"] = str(VENV)
    env["PATH"] = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    env.update(PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return env


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two commands started together in one checkout: the second waits, and then finds the work done."""
    with open(ROOT / ".venv.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another setup of this checkout")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lock_digest(lock: str) -> str:
    return digest((ROOT / lock).read_text())


def project_digest() -> str:
    """Of the part of pyproject.toml that decides how the project itself is installed."""
    import tomllib  # not there before 3.11, and by now the version has been checked

    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [tables["build-system"], tables["project"], tables["tool"]["hatch"]]
    return digest(json.dumps(parts, sort_keys=True))


def base() -> list[str]:
    """What an environment cannot outlive: its Python, and the place of the checkout (its scripts name it)."""
    return [sys.base_prefix, "{}.{}".format(*sys.version_info), str(ROOT)]


def read_state() -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(STATE.read_text())
    except FileNotFoundError:
        return {}
    return state


def write_state(state: dict[str, Any]) -> None:
    new = STATE.with_suffix(".new")
    new.write_text(json.dumps(state, indent=1))
    new.replace(STATE)


def is_current(state: dict[str, Any]) -> bool:
    """Whether .venv can be kept. Not when a lock has changed: it may have dropped a package."""
    return (
        state.get("base") == base()
        and (BIN / "python").exists()
        and all((ROOT / lock).exists() and lock_digest(lock) == old for lock, old in state["locks"].items())
    )


def make_venv() -> dict[str, Any]:
    if VENV.exists() and not STATE.exists():
        raise SetupError(f"{VENV} was not made by this script: move it away, or remove it")
    if VENV.exists():
        # The mark goes last, so that what a killed run leaves behind is still known as ours.
        for entry in VENV.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != STATE:
                entry.unlink()
    else:
        VENV.mkdir()
    state: dict[str, Any] = {"base": base(), "locks": {}, "project": None}
    write_state({**state, "base": None})
    say("making .venv with Python {}.{}.{}".format(*sys.version_info))
    venv.EnvBuilder(with_pip=False, symlinks=True).create(VENV)
    write_state(state)
    return state


def pip() -> list[str]:
    """A pip that installs into .venv: the machine's, or else the one that the standard library carries."""
    command = [sys.executable, "-m", "pip"]
    found = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, cwd=ROOT)
    version = re.match(r"pip (\d+)\.(\d+)", found.stdout)
    if version and (int(version[1]), int(version[2])) >= OLDEST_PIP:
        return [*command, "--python", str(BIN / "python")]
    own = [str(BIN / "python"), "-m", "ensurepip"]
    if subprocess.run(own, capture_output=True, check=False, env=environment()).returncode == 0:
        return [str(BIN / "python"), "-m", "pip"]
    raise SetupError(
        f"{sys.executable} has no pip of version {OLDEST_PIP[0]}.{OLDEST_PIP[1]} or newer "
        "(on Debian and Ubuntu: apt-get install python3-pip)"
    )


def install(what: str, arguments: list[str]) -> None:
    """Run `pip install`, silent but for errors.

    Raises:
        SetupError: pip failed; it has said why.
    """
    say(f"installing {what}")
    started = time.monotonic()
    command = [*pip(), "install", "-qq", "--no-warn-script-location", *arguments]
    if subprocess.run(command, check=False, cwd=ROOT, env=environment()).returncode != 0:
        raise SetupError(f"pip could not install {what}: its reason is above")
    say(f"installed {what} in {time.monotonic() - started:.0f} s")


def ensure(need: str) -> None:
    """Make `.venv` hold what `need` (a key of LOCKS) asks for; at once when it already does."""
    with one_at_a_time():
        state = read_state()
        if not is_current(state):
            state = make_venv()
        held = state["locks"]
        if need == "program" and set(LOCKS["tools"]) <= set(held):
            need = "tools"
        if not set(LOCKS[need]) <= set(held):
            for lock in LOCKS[need]:
                # Wheels only: no code of a package runs while it is installed.
                install(lock, ["--require-hashes", "--only-binary=:all:", "-r", lock])
                held[lock] = lock_digest(lock)
                write_state(state)
        if state["project"] != project_digest():
            # The build backend is in the lock, so this asks no index for anything.
            install("this project (editable)", ["--no-index", "--no-deps", "--no-build-isolation", "-e", "."])
            state["project"] = project_digest()
            write_state(state)


def run(commands: list[list[str]]) -> int:
    """Run all of them, whichever fail, so that one run tells everything. 1 if any failed."""
    failed = []
    for command in commands:
        say(f"running {' '.join(command)}")
        program = str(BIN / command[0])
        done = subprocess.run([program, *command[1:]], check=False, cwd=ROOT, env=environment())
        if done.returncode != 0:
            failed.append(" ".join(command))
    say(f"failed: {', '.join(failed)}" if failed else f"all {len(commands)} passed")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError("Python {}.{} or newer is needed, this is {}.{}".format(*OLDEST_PYTHON, *sys.version_info))
    if Path(sys.prefix).resolve() == VENV:
        # Called with .venv's own Python, which may be about to be replaced: go on with the one it came from.
        python = os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info))
        os.execv(python, [python, __file__, *arguments])
    command, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if command == "demo":
        ensure("program")
        program = str(BIN / "sandbox-plugin")
        os.execve(program, [program, "demo", *rest], environment())
    if command == "test":
        ensure("tools")
        return run([*CHECKS, [*PYTEST, *rest]])
    if command == "fuzz-setup" and not rest:
        ensure("fuzz")
        return 0
    if command in ("lint", "setup") and not rest:
        ensure("tools")
        return run(CHECKS) if command == "lint" else 0
    print(__doc__)
    return 0 if command in ("help", "-h", "--help") else 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (SetupError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
