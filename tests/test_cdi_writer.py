"""How CDI specs come to the disk: the writer in this process, on real folders.

How long specs stay that no resource needs any more is in test_cdi_stale.py, and faults of real disks in test_faults.py.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from cdi_bench import OURS, bench, cdevs, names_in, refusing, with_gpus
from cdi_reader import read_folder, reading
from loop import LIMIT, in_loop
from names import PGPU
from specs import as_text, device, document, reference

from sandbox_plugin.cdi.render import MARK
from sandbox_plugin.host import files
from sandbox_plugin.model import Reason


@in_loop
async def test_without_a_device_there_is_not_even_a_folder_and_with_one_a_spec_that_all_may_read(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cdi"
    async with bench(folder) as at:
        await at.show(with_gpus())
        assert not folder.exists()
        await at.show(with_gpus(3))
        assert stat.S_IMODE((folder / OURS).stat().st_mode) == 0o644
        assert read_folder(folder) == cdevs(3)


@in_loop
async def test_who_reads_while_specs_change_never_sees_half_a_spec_or_a_device_twice(tmp_path: Path) -> None:
    few, many = (2, 3), tuple(range(40))

    def look() -> None:
        assert read_folder(tmp_path) in (cdevs(*few), cdevs(*many))
        for path in tmp_path.iterdir():
            assert path.name == OURS or path.suffix == ".tmp", path

    async with bench(tmp_path) as at:
        await at.show(with_gpus(*few))
        with reading(look) as faults:
            for number in range(30):
                await at.show(with_gpus(*(many, few)[number % 2]))
        assert not faults
    assert names_in(tmp_path) == {OURS}


@in_loop
async def test_a_spec_that_stands_there_is_not_written_again(tmp_path: Path) -> None:
    written: set[int] = set()
    for _ in range(2):  # also by the daemon that comes after this one
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            await at.rounds(5)
            written.add((tmp_path / OURS).stat().st_ino)
    assert len(written) == 1


@in_loop
async def test_a_spec_that_is_gone_comes_back_when_the_writer_is_told_to_look(tmp_path: Path) -> None:
    async with bench(tmp_path, interval=3600) as at:
        at.registry.observe(with_gpus(3))
        await at.rounds(1)
        for _ in range(2):
            (tmp_path / OURS).unlink()
            at.writer.look()
            await at.rounds(1)
            assert read_folder(tmp_path) == cdevs(3)


# What has our name already


@in_loop
async def test_what_another_writer_puts_under_our_name_is_replaced_and_costs_no_device_its_health(
    tmp_path: Path,
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            before = at.registry.current.version
            (tmp_path / OURS).write_bytes(as_text(reference(PGPU)))
            await at.rounds(2)
            assert at.registry.current.version == before, "a device was Unhealthy meanwhile"
            assert read_folder(tmp_path) == cdevs(3)
    (said,) = [log for log in logs if log["event"] == "cdi spec of another writer replaced"]
    assert said["reason"] == "it has the name and the kind of a resource that this plugin serves"


@in_loop
async def test_what_this_plugin_wrote_another_day_is_replaced_without_a_word_of_another_writer(tmp_path: Path) -> None:
    (tmp_path / OURS).write_bytes(MARK.encode() + as_text(reference("other.com/whatever")))
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
    assert read_folder(tmp_path) == cdevs(3)
    assert [log["event"] for log in logs] == ["cdi spec written"]


SOMEBODY_ELSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind": (
        lambda path: path.write_bytes(as_text(reference("other.com/pgpu"))),
        f"{OURS} belongs to another program (kind other.com/pgpu): move it away or choose another alias",
    ),
    "something very large": (lambda path: path.write_bytes(b"#" * (1 << 19)), "it has more than 262144 bytes"),
    "a pipe": (os.mkfifo, "Not a regular file"),
    "a folder": (Path.mkdir, "Not a regular file"),
}
"""What is put under our name, and words of what is said of our devices then."""


@pytest.mark.parametrize("what", SOMEBODY_ELSES)
@in_loop
async def test_what_has_our_name_and_is_somebody_elses_is_kept_and_its_devices_say_so(
    tmp_path: Path, what: str
) -> None:
    put, words = SOMEBODY_ELSES[what]
    put(tmp_path / OURS)
    before = (tmp_path / OURS).stat()
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        reason, detail = at.reason("3")
        assert reason is Reason.NOT_IN_CDI
        assert words in detail
    after = (tmp_path / OURS).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a rest of an earlier write": lambda path: path.write_bytes(b"# Wri"),
    "a pipe": os.mkfifo,
    "a link to a file": lambda path: path.symlink_to("somebody-elses"),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
@in_loop
async def test_whatever_has_the_name_under_which_a_spec_is_written_first_neither_stops_the_writer_nor_is_written_to(
    tmp_path: Path, what: str
) -> None:
    (tmp_path / "somebody-elses").write_bytes(b"whatever")
    IN_THE_WAY[what](tmp_path / f".{OURS}.sandbox-plugin.tmp")
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert at.reason("3") == (None, "")
        assert read_folder(tmp_path) == cdevs(3)
    assert names_in(tmp_path) == {OURS, "somebody-elses"}
    assert (tmp_path / "somebody-elses").read_bytes() == b"whatever"


# What cannot be written


@in_loop
async def test_a_folder_that_cannot_be_written_is_tried_again_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, interval=3600) as at:
        with monkeypatch.context() as patched, structlog.testing.capture_logs() as logs:
            patched.setattr(os, "replace", refusing(errno.EROFS))
            at.registry.observe(with_gpus(3))
            await at.rounds(2)
            reason, detail = at.reason("3")
            assert reason is Reason.NOT_IN_CDI
            assert "Read-only file system" in detail
            assert names_in(tmp_path) == set()
            assert [log["reason"] for log in logs] == [detail], "said once"
        await at.rounds(1)
        assert at.reason("3")[0] in (None, Reason.SETTLING)
        assert read_folder(tmp_path) == cdevs(3)


RIVAL = as_text(document(kind=PGPU, devices=[device("3", deviceNodes=[{"path": "/dev/vfio/devices/vfio4"}])]))


@pytest.mark.parametrize("rival", [RIVAL, None], ids=["overwritten", "removed"])
@in_loop
async def test_while_a_spec_that_is_not_ours_any_more_cannot_be_replaced_no_device_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: bytes | None
) -> None:
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert at.reason("3") == (None, "")
        monkeypatch.setattr(os, "replace", refusing(errno.EROFS))
        if rival is None:
            (tmp_path / OURS).unlink()
        else:
            (tmp_path / OURS).write_bytes(rival)
        await at.rounds(2)
        assert at.reason("3")[0] is Reason.NOT_IN_CDI


@in_loop
async def test_what_an_earlier_run_wrote_counts_although_the_disk_is_full_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3, 4))
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3, 5))
        assert at.reason("3") == (None, "")
        assert at.reason("5")[0] is Reason.NOT_IN_CDI


@in_loop
async def test_while_a_write_hangs_no_device_counts_as_written_and_whoever_cancels_the_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    try:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            monkeypatch.setattr(os, "replace", lambda *paths: released.wait(LIMIT))
            at.registry.observe(with_gpus(3, 4))
            await at.rounds(1)
            reason, detail = at.reason("3")
            assert reason is Reason.NOT_IN_CDI
            assert "has not answered for" in detail
        assert not released.is_set()
    finally:
        released.set()
