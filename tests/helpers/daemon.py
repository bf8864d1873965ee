"""The daemon as a real process: started, watched through its log, and ended by its own process ID.

Apart from conftest, so that tests may use it without fixtures: shared by a module, or several of them in one test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubelet import TIMEOUT

from sandbox_plugin.fake.node import FakeNode

ROOT = Path(__file__).resolve().parents[2]
MEMORY = "/dev/shm"
"""A file system on which thousands of files come and go quickly, on most machines."""
PYTHON = (sys.executable, "-W", "always::ResourceWarning")
"""A file or socket that is not closed says so on stderr, where nothing but log lines may be."""
_OURS = ("SANDBOX_PLUGIN_", "P_GPU_ALIAS", "NVSWITCH_ALIAS")
"""What the environment of a person who runs the tests must not decide."""

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Places:
    """The folders of one made-up machine, under a path that is short: a unix socket's has 107 bytes at most."""

    top: Path

    @property
    def kubelet(self) -> Path:
        return self.top / "device-plugins"

    @property
    def cdi(self) -> Path:
        return self.top / "cdi"

    def node(self, preset: str) -> FakeNode:
        """A fake node, made here."""
        return FakeNode.create(Path(tempfile.mkdtemp(prefix=f"{preset}-", dir=self.top)), preset)

    def flags(self, node: FakeNode | str) -> list[str]:
        """Flags that keep the daemon within these folders. The node may be a preset's name: the daemon makes it."""
        return [
            f"--fake-sysfs={node if isinstance(node, str) else node.root}",
            f"--kubelet-dir={self.kubelet}",
            f"--cdi-dir={self.cdi}",
            f"--pod-resources-socket={self.top}/pod-resources/kubelet.sock",
        ]


@contextmanager
def places() -> Iterator[Places]:
    """Folders for one test; they are gone afterwards."""
    top = Path(tempfile.mkdtemp(prefix="sandbox-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    try:
        yield Places(top)
    finally:
        shutil.rmtree(top)


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of the program's, and with `extra`."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_OURS)} | dict(extra)


def bare_environment(**extra: str) -> dict[str, str]:
    """The same, and a process in it is not measured: that would import more than the program does."""
    return {k: v for k, v in clean_environment(extra).items() if not k.startswith("COVERAGE")}


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sandbox-plugin ARGUMENTS` until it ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "sandbox_plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env=clean_environment(environment),
        check=False,
    )


class Daemon:
    """One `sandbox-plugin run`, from its start to its end.

    Usage:

        with Daemon(places, node, "--health-interval=1") as daemon:
            daemon.wait_for("registered", resource="nvidia.com/pgpu")

    At the end of the context it is asked to end, and must do so in order: see `close`.
    """

    def __init__(self, places: Places, node: FakeNode | str, *flags: str, **environment: str) -> None:
        self.noise: list[str] = []
        """Lines on stderr that are not log lines."""
        self.excused: set[str] = set()
        """Events that `close` would take for a failure, and that a test has brought about on purpose."""
        self._places = places
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False
        self._killed = False
        self._process = subprocess.Popen(
            [*self._command(), *self._arguments(node, flags)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment({"TMPDIR": str(places.top), **self._environment(node), **environment}),
        )
        self._reader = threading.Thread(target=self._read, name="daemon's log", daemon=True)
        self._reader.start()

    # How it is started, for tests that start it in another way

    def _command(self) -> list[str]:
        return [*PYTHON, "-m", "sandbox_plugin"]

    def _arguments(self, node: FakeNode | str, flags: Sequence[str]) -> list[str]:
        return ["run", *self._places.flags(node), *flags]

    def _environment(self, node: FakeNode | str) -> dict[str, str]:
        return {}

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()  # the test has failed already, and its reason is the one to show

    @property
    def pid(self) -> int:
        return self._process.pid

    # Its log

    def mark(self) -> int:
        """How many events there were until now: for `since`."""
        with self._changed:
            return len(self._events)

    def events(self, event: str | None = None, *, since: int = 0, reason: str = "", **fields: str) -> list[Event]:
        """Events of that name, or of any, with these fields, and with `reason` within their reason."""
        with self._changed:
            return [
                seen
                for seen in self._events[since:]
                if event in (None, seen["event"])
                and reason in (seen.get("reason") or "")
                and all(seen.get(name) == value for name, value in fields.items())
            ]

    def wait_for(
        self, event: str, *, since: int = 0, timeout: float = TIMEOUT, reason: str = "", **fields: str
    ) -> Event:
        """The first such event, as soon as it is there.

        Raises AssertionError, with the whole log, when it does not come in `timeout` seconds or the process ends.
        """

        def found() -> list[Event]:
            return self.events(event, since=since, reason=reason, **fields)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, timeout)
            if first := next(iter(found()), None):
                return first
            raise AssertionError(f"no event {event!r} with {fields} and reason {reason!r}:\n{self.log()}")

    def log(self) -> str:
        """All that it has said, for messages."""
        with self._changed:
            return "\n".join([*map(str, self._events), *self.noise])

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            with self._changed:
                if isinstance(event, dict) and "event" in event:
                    self._events.append(event)
                else:
                    self.noise.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # Its end

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Asks it to end. Returns how many seconds that took, and leaves the exit status to `close`."""
        started = time.monotonic()
        self._process.send_signal(number)
        self._process.wait(TIMEOUT)
        return time.monotonic() - started

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Until it has ended by itself. Returns its exit status."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up, and nothing is asked of it any more."""
        self._killed = True
        self._process.kill()
        self._finish()

    def close(self) -> None:
        """Ends it, if it still runs, and sees that it ended in order.

        In order: exit status 0, nothing on stderr but log lines, none of them about a failure of its own (critical,
        or with a traceback), each device in them with its PCI address, and nothing left that `leftovers` names.
        """
        if self._killed:
            return
        if self._process.poll() is None:
            self._process.terminate()
        try:
            status = self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end on SIGTERM:\n{self.log()}") from None
        self._finish()
        assert status == 0, self.log()
        assert not self.noise, "\n".join(self.noise)
        assert not [e for e in self._events if is_failure(e) and e["event"] not in self.excused], self.log()
        assert not [event for event in self._events if "device" in event and "pci_address" not in event], self.log()
        assert leftovers(self._places) == [], self.log()

    def _finish(self) -> None:
        self._process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self._process.stderr is not None
        self._process.stderr.close()


def is_failure(event: Event) -> bool:
    """Whether it tells of a fault of the daemon's own."""
    return event["level"] == "critical" or "exception" in event


def sockets(folder: Path) -> set[str]:
    """Names of the sockets in a folder, the kubelet's own left out."""
    return {path.name for path in folder.iterdir() if path.is_socket()} - {"kubelet.sock"} if folder.is_dir() else set()


def leftovers(places: Places) -> list[str]:
    """What a daemon that has ended must not leave behind: its sockets, half-written specs, and a preset's tree."""
    files = list(places.cdi.iterdir()) if places.cdi.is_dir() else []
    return [
        *sockets(places.kubelet),
        *(path.name for path in files if path.suffix == ".tmp"),
        *(path.name for path in places.top.glob("sandbox-plugin-*")),
    ]
