"""The completion of the command line, as real shells take it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import clean_environment, run_command

from sandbox_plugin.cli.commands import _COMMANDS
from sandbox_plugin.fake.presets import PRESETS

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash here")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completion for bash, in a file."""
    done = run_command("completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
    file = tmp_path_factory.mktemp("completion") / "sandbox-plugin"
    file.write_text(done.stdout)
    return file


def completed(script: Path, line: str, folder: Path) -> list[str]:
    """What bash would offer for the last word of this line."""
    words = f'{line} ""' if line.endswith(" ") else line
    asked = f'. "$1"; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_sandbox_plugin'
    asked += '; printf "%s\\n" "${COMPREPLY[@]}"'
    command = [str(BASH), "--norc", "-c", asked, "bash", str(script)]
    # It calls compopt, which bash has in a completion only, and says so here.
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, timeout=20)
    return done.stdout.split()


CASES = {
    "sandbox-plugin ": list(_COMMANDS),
    "sandbox-plugin fak": ["fake-node"],
    "sandbox-plugin vfio ": ["status", "bind", "unbind"],
    "sandbox-plugin vfio bind --dr": ["--dry-run"],
    "sandbox-plugin fake-node create ": list(PRESETS),
    "sandbox-plugin demo --preset work": ["workstation"],
    "sandbox-plugin demo --d": ["--dra"],
    "sandbox-plugin demo --dra ": [],
    "sandbox-plugin run --consumer ": ["kata", "kubevirt"],
    "sandbox-plugin run --log-level wa": ["warning"],
    "sandbox-plugin status --output ": ["table", "json"],
    "sandbox-plugin completion ": ["bash", "zsh", "fish"],
    "sandbox-plugin run --config ": ["a-file", "a-folder"],
    "sandbox-plugin run --cdi-dir ": ["a-folder"],
}


@needs_bash
@pytest.mark.parametrize("line", CASES)
def test_bash_offers_what_may_stand_there(script: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder").mkdir()
    assert sorted(completed(script, line, tmp_path)) == sorted(CASES[line])


@needs_bash
def test_a_tab_in_bash_completes_the_verb(script: Path) -> None:
    ours, its = pty.openpty()
    environment = clean_environment({"TERM": "dumb", "PS1": "ready> "})
    command = [str(BASH), "--norc", "-i"]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True) as bash:
        os.close(its)
        try:
            shown = answers(ours)
            wait_for("ready> ", shown)
            os.write(ours, f". {script}\n".encode())
            wait_for("ready> ", shown)
            os.write(ours, b"sandbox-plugin fake-node cre\t")
            wait_for("sandbox-plugin fake-node create ", shown)
        finally:
            bash.kill()
            os.close(ours)


def answers(terminal: int) -> Iterator[str]:
    """What a terminal shows, piece by piece."""
    while True:
        yield os.read(terminal, 65536).decode()


def wait_for(text: str, shown: Iterator[str]) -> None:
    seen = ""
    while text not in seen:
        seen += next(shown)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_command(shell: str) -> None:
    done = run_command("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in _COMMANDS)
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "--no-execute"], input=done.stdout, text=True, check=True, timeout=20)
