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

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

OLDEST_PYTHON = (3, 11)

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PATIENCE = 5.0
"""Seconds of silence while something is installed."""
STATE = VENV / "dev-state.json"
"""What has been installed, so that the next run need not ask; and the mark of an environment that is ours."""

LOCKS = {
    "program": ["requirements/dra.txt", "requirements/build.txt"],
    "tools": ["requirements/dev.txt"],  # holds all of the program's at the same versions
    "fuzz": ["requirements/dev.txt", "requirements/fuzz.txt"],
}
PROJECT = "pyproject.toml"
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
    misleading = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER"}
    env = {name: value for name, value in os.environ.items() if name not in misleading}
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    return {**env, "VIRTUAL_ENV": str(VENV), "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def digest(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()


def base() -> str:
    """What an environment cannot outlive: its Python, and the place of the checkout (its scripts name it)."""
    return "{} {}.{} {}".format(sys.base_prefix, *sys.version_info[:2], ROOT)


def ensure(need: str) -> None:
    """Make `.venv` hold what `need` (a key of LOCKS) asks for; at once when it already does."""
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that are started together the second finds the work done
        installed = read_state() or make_venv()
        if need == "program" and LOCKS["tools"][0] in installed:
            need = "tools"
        for file in LOCKS[need]:
            if file not in installed:
                # Wheels only: no code of a package runs while it is installed.
                install(file, ["--require-hashes", "--only-binary=:all:", "-r", file])
                write_state(installed, file)
        if installed.get(PROJECT) != digest(PROJECT):
            # The build backend is in the lock, so this asks no index for anything.
            install("this project (editable)", ["--no-index", "--no-deps", "--no-build-isolation", "-e", "."])
            write_state(installed, PROJECT)


def read_state() -> dict[str, str]:
    """File -> its digest when it was installed; "base" is what the environment was made with.

    Empty if .venv cannot be kept: a lock that has changed may have dropped a package.
    """
    if not STATE.exists() or not (BIN / "python").exists():
        return {}
    state: dict[str, str] = json.loads(STATE.read_text())
    is_current = state["base"] == base() and all(
        (ROOT / lock).exists() and digest(lock) == state[lock] for lock in state.keys() - {"base", PROJECT}
    )
    return state if is_current else {}


def write_state(state: dict[str, str], file: str) -> None:
    """Notes that this file has been installed, too."""
    state[file] = digest(file)
    STATE.write_text(json.dumps(state, indent=1))


def make_venv() -> dict[str, str]:
    if VENV.exists() and not STATE.exists():
        raise SetupError(f"{VENV} was not made by this script: move it away, or remove it")
    if VENV.exists():
        shutil.rmtree(VENV)
    say("making .venv with Python {}.{}.{}".format(*sys.version_info))
    venv.EnvBuilder(with_pip=False, symlinks=True).create(VENV)
    state = {"base": base()}
    STATE.write_text(json.dumps(state))
    return state


def install(what: str, arguments: list[str]) -> None:
    """Run `pip install`, with a line now and then of how far it is. Raises SetupError when pip fails; it has said why.

    pip itself says a line and more for each package, or nothing.
    """
    say(f"installing {what}")
    pip = [sys.executable, "-m", "pip", "--python", str(BIN / "python")]
    command = [*pip, "install", "--progress-bar=off", "--no-warn-script-location", *arguments]
    with tempfile.TemporaryFile() as output:

        def said() -> str:
            # Not `seek` and `read`: pip writes where this file's position is.
            return os.pread(output.fileno(), os.fstat(output.fileno()).st_size, 0).decode(errors="replace")

        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output) as process:
            while True:
                try:
                    process.wait(PATIENCE)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {progress(said(), what)}")
        if process.returncode != 0:
            print(reason(said()), file=sys.stderr, flush=True)
            raise SetupError(f"pip could not install {what}: its reason is above (pip 22.3 or newer is needed)")


def progress(said: str, what: str) -> str:
    """How far an installation is, by what pip has said."""
    if "\nInstalling collected packages" in said:
        there = len(list(VENV.glob("lib/*/site-packages/*.dist-info")))
        return f"unpacking: {there} packages are in .venv"
    fetched = len(re.findall("^(?:Collecting|Processing) ", said, re.MULTILINE))
    wanted = len(re.findall("^[^ #]+==", (ROOT / what).read_text(), re.MULTILINE)) if (ROOT / what).exists() else 1
    return f"fetching: {fetched} of {wanted} packages"


def reason(said: str) -> str:
    """Why pip failed: what it says from its first error on, or else the last that it said."""
    lines = said.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("ERROR")), -10)
    return "\n".join(lines[first:])


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
