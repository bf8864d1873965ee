"""Writing to files that may never answer, and loading modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_plugin.host.bind import HostKernel

ENOUGH = 60.0
"""Seconds that what answers may take."""


def test_it_writes_in_one_call_and_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "driver_override"
    file.write_text("(null)\n")
    with HostKernel(ENOUGH) as kernel:
        assert kernel.read(str(file)) == "(null)"
        kernel.write(str(file), "vfio-pci")
    assert file.read_text() == "vfio-pci"


def test_the_kernels_answer_comes_with_the_file(tmp_path: Path) -> None:
    with HostKernel(ENOUGH) as kernel:
        with pytest.raises(FileNotFoundError) as caught:
            kernel.write(str(tmp_path / "absent"), "x")
        assert caught.value.filename == str(tmp_path / "absent")
        assert "No such file" in str(caught.value)


def test_a_write_that_waits_is_given_up_and_the_next_one_goes_through(tmp_path: Path) -> None:
    blocked, free = tmp_path / "unbind", tmp_path / "free"
    os.mkfifo(blocked)  # whoever opens it waits for a reader
    free.touch()
    with HostKernel(0.2) as impatient, pytest.raises(TimeoutError, match=r"no answer for 0\.2 s"):
        impatient.write(str(blocked), "x")
    with HostKernel(ENOUGH) as kernel:
        kernel.write(str(free), "x")
    assert free.read_text() == "x"
    assert blocked.read_text() == "x"  # the one that waited goes on when it may


def test_a_process_with_a_write_that_waits_ends_and_holds_no_output_open(tmp_path: Path) -> None:
    blocked = tmp_path / "unbind"
    os.mkfifo(blocked)
    program = (
        "import sys\n"
        "from sandbox_plugin.host.bind import HostKernel\n"
        "with HostKernel(0.2) as kernel:\n"
        "    try: kernel.write(sys.argv[1], 'x')\n"
        "    except TimeoutError: print('gave up')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(blocked)], capture_output=True, text=True, timeout=ENOUGH
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "gave up\n", "")
    assert blocked.read_text() == "x"


def test_a_writer_that_was_killed_is_an_error_and_the_next_write_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "free"
    file.touch()
    with HostKernel(ENOUGH) as kernel:
        with monkeypatch.context() as patch:
            patch.setattr("sandbox_plugin.host.bind._WRITER", "input()")
            with pytest.raises(OSError, match="has ended"):
                kernel.write(str(file), "x")
        kernel.write(str(file), "y")
    assert file.read_text() == "y"


@pytest.fixture
def modprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A modprobe that a test writes, found before any other."""
    script = tmp_path / "modprobe"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return script


def test_a_module_is_loaded_by_modprobe(modprobe: Path, tmp_path: Path) -> None:
    modprobe.write_text(f"#!/bin/sh\necho $1 > {tmp_path}/loaded\n")
    HostKernel(ENOUGH).load("vfio_pci")
    assert (tmp_path / "loaded").read_text() == "vfio_pci\n"


def test_what_modprobe_says_is_passed_on(modprobe: Path) -> None:
    modprobe.write_text("#!/bin/sh\necho 'FATAL: Module vfio_pci not\nfound' >&2\nexit 1\n")
    with pytest.raises(OSError, match=r"FATAL: Module vfio_pci not found \(a container needs the host's /lib/modules"):
        HostKernel(ENOUGH).load("vfio_pci")


def test_a_modprobe_that_says_nothing_is_quoted_by_its_status(modprobe: Path) -> None:
    modprobe.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(OSError, match="status 3"):
        HostKernel(ENOUGH).load("vfio_pci")


def test_a_modprobe_that_does_not_end_is_given_up(modprobe: Path) -> None:
    modprobe.write_text("#!/bin/sh\nexec sleep 600\n")
    with pytest.raises(TimeoutError, match="no end of modprobe"):
        HostKernel(0.2).load("vfio_pci")


def test_without_modprobe_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_plugin.host.bind.shutil.which", lambda *_, **__: None)
    with pytest.raises(OSError, match="`modprobe vfio_pci` on the host"):
        HostKernel(ENOUGH).load("vfio_pci")
