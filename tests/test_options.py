"""What a person gives wrong: each message names the flag, variable or file that it came from. And a fake host."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox_plugin.cli.main import main
from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import OPTIONS, Settings, UsageError
from sandbox_plugin.fake.node import FakeNode

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Exit status of `sandbox-plugin list`, and the one line that it says on stderr."""

    def run(*flags: str, **environment: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            status = main(["list", *flags])
        out, errors = capsys.readouterr()
        assert out == ""
        assert errors.startswith("sandbox-plugin: ")
        assert errors.count("\n") == 1
        return status, errors.removeprefix("sandbox-plugin: ").rstrip("\n")

    return run


@contextmanager
def as_somebody() -> Iterator[None]:
    """Without root's right to look everywhere."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


# --fake-sysfs


@pytest.mark.parametrize("text", ["nope", "", "/etc/passwd", "/etc", "a\nb"])
def test_what_is_no_host_is_refused_by_the_name_of_the_flag(said: Said, text: str) -> None:
    status, line = said(f"--fake-sysfs={text}")
    assert status == 2
    assert line.startswith(f"--fake-sysfs: {text!r} is neither a folder with `sys` in it nor a preset (hgx-h100, ")


def test_what_is_no_host_is_refused_by_the_name_of_the_variable(said: Said) -> None:
    status, line = said(SANDBOX_PLUGIN_FAKE_SYSFS="nope")
    assert status == 2
    assert line.startswith("SANDBOX_PLUGIN_FAKE_SYSFS: 'nope' is neither")


def test_an_empty_flag_is_refused_even_where_the_variable_names_a_host(said: Said) -> None:
    assert said("--fake-sysfs=", SANDBOX_PLUGIN_FAKE_SYSFS="gh200")[0] == 2


def test_what_cannot_be_looked_at_is_refused_with_the_reason(said: Said, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert said(f"--fake-sysfs={tmp_path}/loop") == (
        2,
        f"--fake-sysfs: '{tmp_path}/loop': Too many levels of symbolic links",
    )
    status, line = said(f"--fake-sysfs={'x' * 300}")
    assert (status, line.endswith("x': File name too long")) == (2, True)


def test_a_folder_that_is_not_for_everybody_is_refused_with_the_reason(said: Said) -> None:
    locked = Path(tempfile.mkdtemp())
    (locked / "sys").mkdir()
    locked.chmod(0)
    try:
        said("--fake-sysfs=")  # imports all that somebody else may not be allowed to read
        with as_somebody():
            answer = said(f"--fake-sysfs={locked}")
    finally:
        locked.chmod(0o700)
        (locked / "sys").rmdir()
        locked.rmdir()
    assert answer == (2, f"--fake-sysfs: '{locked}': Permission denied")


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, on a disk with room for a part of a tree."""
    written = 0
    write = os.write

    def write_some(descriptor: int, content: bytes) -> int:
        nonlocal written
        written += len(content)
        if written > 15_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", write_some)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_disk_too_full_for_a_preset_is_a_failure_that_names_the_folder(said: Said, full_disk: Path) -> None:
    status, line = said("--fake-sysfs=gh200")
    assert status == 1
    assert line.startswith(f"{full_disk}/sandbox-plugin-")
    assert line.endswith("/gh200: No space left on device")
    assert list(full_disk.iterdir()) == []


def test_no_folder_for_temporary_files_is_a_failure_in_one_line(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", none)
    assert said("--fake-sysfs=gh200") == (1, "No usable temporary directory found in ['/tmp']")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fake-node", "bind", "node", "0000:1b:00.0", "nvidia"], "nvidia (see sandbox-plugin fake-node bind --help)"),
        (["fake-node", "presets", "--all"], "--all (see sandbox-plugin fake-node presets --help)"),
        (["list", "extra", "--more"], "extra --more (see sandbox-plugin list --help)"),
        (["--more"], "--more (see sandbox-plugin run --help)"),
    ],
)
def test_what_a_command_does_not_know_is_named_with_the_help_of_that_command(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"sandbox-plugin: unrecognized arguments: {told}\n"


# Paths


NO_UTF_8 = "/tmp/\udcff"
"""As the interpreter shows what is not."""
PATHS = {option.name: option for option in OPTIONS if isinstance(getattr(Settings(), option.name), Path)}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_not_utf_8_is_refused_by_the_name_of_its_flag_or_variable(name: str) -> None:
    for flags, environment, where in (
        ({name: NO_UTF_8}, {}, PATHS[name].flag),
        ({}, {PATHS[name].environment: NO_UTF_8}, PATHS[name].environment),
    ):
        with pytest.raises(UsageError) as refused:
            load_settings(flags, environment)
        assert str(refused.value) == f"{where}: {NO_UTF_8!r} is not UTF-8, as a path must be here"


def test_all_settings_that_are_paths_are_known_to_be() -> None:
    assert set(PATHS) == {"kubelet_dir", "pod_resources_socket", "cdi_dir"}


@pytest.mark.parametrize("variable", ["SANDBOX_PLUGIN_CONFIG", "SANDBOX_PLUGIN_FAKE_SYSFS"])
def test_a_config_file_or_a_fake_host_whose_path_is_not_utf_8_is_refused_too(
    said: Said, tmp_path: Path, variable: str
) -> None:
    folder = tmp_path / "\udcff"
    path = FakeNode.create(folder, "gh200").root
    if variable.endswith("CONFIG"):
        path = folder / "plugin.toml"
        path.touch()
    flag = "--" + variable.removeprefix("SANDBOX_PLUGIN_").lower().replace("_", "-")
    why = f"'{tmp_path}/\\udcff{str(path).removeprefix(str(folder))}' is not UTF-8, as a path must be here"
    assert said(f"{flag}={path}") == (2, f"{flag}: {why}")
    assert said(**{variable: str(path)}) == (2, f"{variable}: {why}")


@pytest.mark.parametrize("flag", ["--config", "--fake-sysfs"])
def test_what_a_terminal_would_obey_is_shown_in_messages(said: Said, flag: str) -> None:
    status, line = said(f"{flag}=\x1b[31m")
    assert status == 2
    assert "\\x1b[31m" in line


# Where a value comes from


CLASHES = [
    (["--gpu-alias=xx", "--nvswitch-alias=xx"], {}, "", "--gpu-alias and --nvswitch-alias are both 'xx'"),
    (["--gpu-alias=nvswitch"], {}, "", "--gpu-alias and the default of --nvswitch-alias are both 'nvswitch'"),
    ([], {"NVSWITCH_ALIAS": "pgpu"}, "", "the default of --gpu-alias and NVSWITCH_ALIAS are both 'pgpu'"),
    (["--gpu-alias=xx"], {"NVSWITCH_ALIAS": "xx"}, "", "--gpu-alias and NVSWITCH_ALIAS are both 'xx'"),
    (
        [],
        {"NVSWITCH_ALIAS": "xx"},
        'gpu-alias = "xx"',
        "config file {file}: gpu-alias and NVSWITCH_ALIAS are both 'xx'",
    ),
    (
        ["--gpu-alias=y"],
        {},
        'gpu-alias = "xx"\nnvswitch-alias = "xx"',
        "config file {file}: gpu-alias and config file {file}: nvswitch-alias are both 'xx'",
    ),
    (
        ["--gpu-alias="],
        {},
        '[names]\n"10DE:2330" = "nvswitch"',
        "config file {file}: names: '10de:2330' and the default of --nvswitch-alias are both 'nvswitch'",
    ),
    (
        [],
        {"NVSWITCH_ALIAS": "", "P_GPU_ALIAS": "xx"},
        '[names]\n"10de:22a3" = "xx"',
        "config file {file}: names: '10de:22a3' and P_GPU_ALIAS are both 'xx'",
    ),
]


@pytest.mark.parametrize(("flags", "environment", "text", "line"), CLASHES, ids=[case[-1] for case in CLASHES])
def test_aliases_that_are_the_same_are_refused_with_both_places_that_they_come_from(
    said: Said, tmp_path: Path, flags: list[str], environment: dict[str, str], text: str, line: str
) -> None:
    file = tmp_path / "plugin.toml"
    file.write_text(text)
    assert said(f"--config={file}", *flags, **environment) == (2, f"{line.format(file=file)}: they must differ")


def test_an_empty_name_of_a_config_file_is_refused_as_a_flag_and_is_none_as_a_variable(
    said: Said, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert said("--config=") == (2, "--config: '' is not a path")
    monkeypatch.setenv("SANDBOX_PLUGIN_CONFIG", "")
    node = FakeNode.create(tmp_path, "gh200")
    assert main(["list", f"--fake-sysfs={node.root}"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "flag", "environment", "why"),
    [
        ('gpu-alias = "9"', "--gpu-alias=x", {}, "gpu-alias: '9' is not a valid resource name"),
        ('gpu-alias = "9"', "--all", {"P_GPU_ALIAS": "xx"}, "gpu-alias: '9' is not a valid resource name"),
        ('require-iommufd = "maybe"', "--require-iommufd", {}, "require-iommufd: 'maybe' is not one of"),
        ("health-interval = 0", "--all", {"SANDBOX_PLUGIN_HEALTH_INTERVAL": "1"}, "health-interval: '0' is not a"),
    ],
)
def test_a_wrong_value_in_the_config_file_is_refused_also_where_it_would_not_count(
    said: Said, tmp_path: Path, text: str, flag: str, environment: dict[str, str], why: str
) -> None:
    file = tmp_path / "plugin.toml"
    file.write_text(text)
    status, line = said(f"--config={file}", flag, **environment)
    assert status == 2
    assert line.startswith(f"config file {file}: {why}")
