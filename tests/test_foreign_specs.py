"""Other people's specs that fail every Kata pod, and other people who write our spec: what is said of them, and when.

Verdicts on single specs are in test_cdi_lint.py.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from cdi_bench import OURS, refusing
from cdi_reader import read_folder
from conftest import MakeNode, StartDaemon
from daemon import Places
from kubelet import TIMEOUT, GrpcKubelet
from loop import LIMIT, in_loop
from names import PGPU
from specs import as_text, device, document
from trials import QUICK, wait_until

from sandbox_plugin.cdi.foreign import ForeignSpecWatch, cdi_folders, read_specs
from sandbox_plugin.cdi.lint import lint
from sandbox_plugin.config.settings import Settings

Log = MutableMapping[str, Any]
Logs = list[Log]
GOOD, NO_DEVICES = as_text(document()), as_text(document(devices=[]))


# Which files are looked at


TREES: dict[str, tuple[dict[str, str], str | None]] = {
    "one device in the folder and in a sub-folder": ({"sub/b.yaml": "a"}, "sub/b.yaml"),
    "another device in a sub-folder": ({"sub/b.yaml": "b"}, None),
    "a bad spec in a sub-folder": ({"sub/b.yaml": ""}, "sub/b.yaml"),
    "an ending of another case": ({"x.YAML": "a"}, "x.YAML"),
    "another ending": ({"x.yml": "a"}, None),
    "a folder that is named like a spec": ({"dir.yaml/b.yaml": "b"}, None),
    "a link to a spec of the folder": ({"b.yaml": "-> a.yaml"}, "b.yaml"),
    "a dangling link": ({"b.json": "-> nowhere"}, "b.json"),
    "a link to itself": ({"b.json": "-> b.json"}, "b.json"),
}
"""What is put beside `a.yaml`, which has the device `a`, and which file is bad then.

Path -> the name of the one device of a good spec, `-> TARGET` for a link, or nothing for a bad spec.
"""


@pytest.mark.parametrize("name", TREES)
def test_a_folder_is_bad_when_either_library_refuses_it_whatever_its_sub_folders_and_endings(
    tmp_path: Path, name: str
) -> None:
    entries, bad = TREES[name]
    folder = tmp_path / "cdi"
    for file, what in {"a.yaml": "a", **entries}.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if what.startswith("-> "):
            path.symlink_to(what.removeprefix("-> "))
        else:
            path.write_bytes(as_text(document(devices=[device(what)])) if what else b"{")
    specs = read_specs(folder, {})
    assert read_specs(folder, specs) == specs
    assert lint({file: known.says for file, known in specs.items()}).keys() == ({folder / bad} if bad else set())


def test_a_spec_that_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_bytes(as_text(document(devices=[device(name[0])])))
    before = read_specs(tmp_path, {})
    (tmp_path / "b.yaml").write_bytes(b"something else")
    now = read_specs(tmp_path, before)
    assert now[tmp_path / "a.yaml"] is before[tmp_path / "a.yaml"]
    assert now[tmp_path / "b.yaml"].says.wrong


@pytest.mark.parametrize("name", ["scandir", "stat"])
def test_for_want_of_descriptors_or_memory_nothing_is_said_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a.yaml").write_bytes(GOOD)
    with monkeypatch.context() as patched:
        patched.setattr(os, name, refusing(errno.EMFILE))
        with pytest.raises(OSError, match="Too many open files"):
            read_specs(tmp_path, {})


def test_the_folders_are_those_that_kata_reads_and_ours_each_once(tmp_path: Path) -> None:
    etc, var = Path("/etc/cdi"), Path("/var/run/cdi")
    assert folders_of(Settings()) == {etc, var}
    assert folders_of(Settings(cdi_dir=etc)) == {etc, var}
    assert folders_of(Settings(cdi_dir=tmp_path)) == {tmp_path, etc, var}
    (tmp_path / "var").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "var/run").symlink_to("../run")
    on_fake = Settings(cdi_dir=tmp_path / "run/cdi").on_fake_host(tmp_path)
    assert folders_of(on_fake) == {tmp_path / "run/cdi", tmp_path / "etc/cdi"}


def folders_of(settings: Settings) -> set[Path]:
    return set(asyncio.run(cdi_folders(settings)))


def test_a_folder_that_does_not_answer_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(cdi_dir=tmp_path / "ours").on_fake_host(tmp_path)
    released = threading.Event()
    real = os.path.realpath

    def hang(path: Path) -> str:
        return real(path) if path != tmp_path / "etc/cdi" or released.wait(TIMEOUT) else "-"

    monkeypatch.setattr(os.path, "realpath", hang)
    try:
        assert folders_of(settings) == {tmp_path / "ours", tmp_path / "var/run/cdi", tmp_path / "etc/cdi"}
    finally:
        released.set()


# The real process


def test_bad_specs_in_either_folder_are_named_once_at_start_and_never_touched(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("workstation")
    etc = node.root / "etc/cdi"
    (etc / "deeper").mkdir(parents=True)
    places.cdi.mkdir()
    rivals = document(kind=PGPU, devices=[device("11")])
    bad = {
        places.cdi / "broken.json": (b"kind: [unclosed\n", "not valid YAML or JSON"),
        places.cdi / "a-rival.json": (as_text(rivals), f"device {PGPU}=11 is in {OURS} too"),
        etc / "deeper/empty.yaml": (b"", "it is empty"),
    }
    good = [folder / "nvidia.yaml" for folder in (places.cdi, etc)]
    for file in good:
        file.write_bytes(GOOD)
    for file, (content, _) in bad.items():
        file.write_bytes(content)
    before = {file: (file.read_bytes(), file.stat().st_ino, file.stat().st_ctime_ns) for file in [*bad, *good]}
    plugin = daemon(node, QUICK)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11", "13"})
    for file, (_, words) in bad.items():
        told = plugin.wait_for("bad cdi spec", path=str(file), reason=words)
        assert told["level"] == "error"
        assert "Kata fails every pod of this node until this spec is repaired, or moved out" in told["action"]
    (etc / "new.yaml").write_bytes(NO_DEVICES)  # seen by its event or by the next look, after the others
    plugin.wait_for("bad cdi spec", path=str(etc / "new.yaml"), reason="it has no devices")
    twice = plugin.wait_for("cdi device in two folders", path=str(etc / "nvidia.yaml"))
    assert f"device vendor.com/class=0 is in {places.cdi / 'nvidia.yaml'} too" in twice["reason"]
    assert len(plugin.events("cdi device in two folders")) == 1
    names = [event["path"] for event in plugin.events("bad cdi spec")]
    assert sorted(names) == sorted(map(str, [*bad, etc / "new.yaml"]))
    assert before == {file: (file.read_bytes(), file.stat().st_ino, file.stat().st_ctime_ns) for file in before}


# The watch in this process


@asynccontextmanager
async def watch(folder: Path) -> AsyncIterator[Logs]:
    """A watch over one folder; gives what it logs."""
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        with structlog.testing.capture_logs() as logs:
            task = group.create_task(ForeignSpecWatch(folder=folder, interval=0.02).run())
            yield logs
            task.cancel()


async def said(logs: Logs, event: str, file: Path, reason: str = "") -> Log:
    """The event of this file with these words in its reason, as soon as it is there."""
    while True:
        for log in logs:
            if (log["event"], log["path"]) == (event, str(file)) and reason in log.get("reason", ""):
                return log
        await asyncio.sleep(0.005)


@in_loop
async def test_a_spec_that_turns_bad_is_named_when_it_does_and_one_that_is_healed_is_told(tmp_path: Path) -> None:
    file = tmp_path / "vendor.yaml"

    async with watch(tmp_path) as logs:
        for content, words in ((b"", "it is empty"), (NO_DEVICES, "no devices")):
            replace_whole(file, content)
            await said(logs, "bad cdi spec", file, words)
        assert len(logs) == 2
        replace_whole(file, GOOD)
        await said(logs, "bad cdi spec is gone", file)
        assert len(logs) == 3


@in_loop
async def test_what_cannot_be_read_or_judged_is_told_and_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "huge.yaml").write_bytes(b"#" * (1 << 19))
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")

    async with watch(tmp_path) as logs:
        await said(logs, "bad cdi spec", tmp_path / "loop.yaml", "a dangling symlink")
        for name, words in {"huge.yaml": "more than 262144 bytes", "pipe.json": "Not a regular file"}.items():
            told = await said(logs, "cdi spec not judged", tmp_path / name, words)
            assert "if Kata's pods fail" in told["action"]
        assert len(logs) == 3


# Another writer of our spec


def replace_whole(file: Path, content: bytes) -> None:
    beside = file.with_name("x")
    beside.write_bytes(content)
    beside.replace(file)


THEIRS = as_text(document(kind=PGPU, devices=[device("0", deviceNodes=[{"path": "/dev/vfio/11"}])]))
"""Our spec as another program would write it."""


@contextmanager
def rival(act: Callable[[], object], pause: float) -> Iterator[None]:
    """Another program at work, which acts again and again."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(pause):
            act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(TIMEOUT)


def test_against_another_writer_of_our_spec_ours_wins_and_the_fight_is_named_once_and_no_loop(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11", "13"})
    ours = places.cdi / OURS
    wanted = ours.read_bytes()
    rounds = 0

    def act() -> None:
        """As kata-manager would: whenever its own text does not stand there, it puts it there."""
        nonlocal rounds
        if ours.read_bytes() != THEIRS:
            replace_whole(ours, THEIRS)
            rounds += 1

    since, started = plugin.mark(), time.monotonic()
    with rival(act, 0.001):
        first = plugin.wait_for("cdi spec of another writer replaced", resource=PGPU, path=str(ours))
        named = plugin.wait_for("another writer keeps writing our cdi spec", resource=PGPU, path=str(ours))
        wait_until(lambda: rounds >= 8, "it should go on to win")
    seconds = time.monotonic() - started
    assert (first["level"], named["level"]) == ("warning", "error")
    assert "kata-manager" in named["action"]
    assert rounds <= seconds / 0.25 + 2, "a loop of writing"
    wait_until(lambda: ours.read_bytes() == wanted, "the last word is ours")
    assert len(plugin.events("cdi spec of another writer replaced", since=since)) == 1
    assert len(plugin.events("another writer keeps writing our cdi spec", since=since)) == 1
    assert len(plugin.events("cdi spec written", since=since)) == 2, "nothing is news any more"
    assert len(read_folder(places.cdi)) == 2
    assert kubelet.unhealthy(PGPU) == set()
    assert [len(received.unhealthy) for received in kubelet.history(PGPU)] == [0] * len(kubelet.history(PGPU))


@pytest.mark.slow
def test_against_a_rival_that_writes_every_second_our_spec_is_there_most_of_the_time_whatever_the_interval(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    daemon(fake_node("workstation"), "--health-interval=3600")
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11", "13"})
    ours = places.cdi / OURS
    wanted = ours.read_bytes()
    samples = []
    with rival(lambda: replace_whole(ours, THEIRS), 1):
        end = time.monotonic() + 6.5
        while time.monotonic() < end:
            samples.append(ours.read_bytes() == wanted)
            time.sleep(0.01)
    share = sum(samples) / len(samples)
    print(f"FIGURE our spec against a rival that writes every second: there in {share:.0%} of {len(samples)} looks")
    assert 0.7 < share < 1
    wait_until(lambda: ours.read_bytes() == wanted, "the last word is ours")
