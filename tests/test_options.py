"""What a person gives wrong: each message names the flag, variable or file that it came from. And a fake host."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sandbox_plugin.cli.main import main
from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import OPTIONS, Option, UsageError
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


# A fake host


@pytest.mark.parametrize("text", ["nope", "", "/etc/passwd", "/etc", "a\nb"])
def test_what_is_no_host_is_refused_by_the_name_of_the_flag_or_variable(said: Said, text: str) -> None:
    why = f"{text!r} is neither a folder with `sys` in it nor a preset (hgx-h100, "
    status, line = said(f"--fake-sysfs={text}", SANDBOX_PLUGIN_FAKE_SYSFS="gh200")
    assert (status, line.startswith(f"--fake-sysfs: {why}")) == (2, True), line
    if text:  # an empty variable is as good as none
        status, line = said(SANDBOX_PLUGIN_FAKE_SYSFS=text)
        assert (status, line.startswith(f"SANDBOX_PLUGIN_FAKE_SYSFS: {why}")) == (2, True), line


def test_a_host_that_cannot_be_looked_at_is_refused_with_the_reason(said: Said, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert said(f"--fake-sysfs={loop}") == (2, f"--fake-sysfs: '{loop}': Too many levels of symbolic links")


def test_a_preset_is_a_host_for_as_long_as_the_command_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SANDBOX_PLUGIN_FAKE_SYSFS", "gh200")
    assert main(["list"]) == 0
    assert "GH200" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_where_no_preset_can_be_made_it_is_a_failure_that_names_the_folder(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    status, line = said("--fake-sysfs=gh200")
    assert status == 1
    assert re.fullmatch("/nowhere/sandbox-plugin-.*: No such file or directory", line)


# What is no flag


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fake-node", "unbind", "node", "1b:00.0", "nvidia"], "nvidia (see sandbox-plugin fake-node unbind --help)"),
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


CHOICES = {
    "runn": "argument COMMAND: 'runn' (did you mean 'run'?) is not one of run, list, ",
    "RUN": "argument COMMAND: 'RUN' (did you mean 'run'?) is not one of run, list, ",
    "frobnicate": "argument COMMAND: 'frobnicate' is not one of run, list, ",
    "vfio bnd": "argument VERB: 'bnd' (did you mean 'bind'?) is not one of status, bind, unbind (see",
    "fake-node creat x": "argument VERB: 'creat' (did you mean 'create'?) is not one of create, presets, ",
    "fake-node create hgx_h10 x": "there is no preset 'hgx_h10' (did you mean 'hgx-h100'?); there are hgx-h100, ",
    "fake-node enable x 1b:00.0 2": "argument 0|1: '2' is not one of 0, 1 (see",
    "demo --preset workstaton": "--preset: 'workstaton' (did you mean 'workstation'?) is not one of hgx-h100, ",
    "status --output jsn": "argument --output: 'jsn' (did you mean 'json'?) is not one of table, json (see",
    "--fake-sysfs gh20": "--fake-sysfs: 'gh20' (did you mean 'gh200'?) is neither a folder with `sys` in it nor a ",
    "--log-level wraning": "--log-level: 'wraning' (did you mean 'warning'?) is not one of debug, info, warning, error",
    "--gpu_alias=x": "unrecognized arguments: --gpu_alias=x (did you mean '--gpu-alias'?) (see",
    "--log-levl info --zzz": "unrecognized arguments: --log-levl (did you mean '--log-level'?) info --zzz (see",
    "fake-node bind x 1b:00.0 nvidia": "a driver needs its flag; write `sandbox-plugin fake-node bind x 0000:1b:00.0 "
    "--driver nvidia`",
}


@pytest.mark.parametrize("arguments", CHOICES)
def test_a_slip_gets_one_line_with_what_was_perhaps_meant(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sandbox-plugin: {CHOICES[arguments]}"), said
    assert said.count("\n") == 1


def status_of(arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("command", ["doctor", "vfio status"])
def test_the_form_of_an_output_may_be_given_in_capitals(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status_of([*command.split(), "--fake-sysfs=gh200", "--output=JSON"])
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("flag", ["--config", "--fake-sysfs"])
def test_what_a_terminal_would_obey_is_shown_in_messages(said: Said, flag: str) -> None:
    status, line = said(f"{flag}=\x1b[31m")
    assert status == 2
    assert "\\x1b[31m" in line


# Paths


def refused(flags: dict[str, str], environment: Mapping[str, str] | None = None) -> str:
    """Why these are no settings."""
    with pytest.raises(UsageError) as error:
        load_settings(flags, environment or {})
    return str(error.value)


NO_UTF_8 = "/tmp/\udcff"
"""As the interpreter shows what is not."""
PATHS = [option for option in OPTIONS if isinstance(option.default, Path)]


@pytest.mark.parametrize("option", PATHS, ids=lambda option: option.name)
def test_a_path_that_is_not_utf_8_is_refused_by_the_name_of_its_flag_or_variable(option: Option) -> None:
    assert refused({option.name: NO_UTF_8}) == f"{option.flag}: {NO_UTF_8!r} is not UTF-8, as a path must be here"
    why = refused({}, {option.environment: NO_UTF_8})
    assert why == f"{option.environment}: {NO_UTF_8!r} is not UTF-8, as a path must be here"


@pytest.mark.parametrize("variable", ["SANDBOX_PLUGIN_CONFIG", "SANDBOX_PLUGIN_FAKE_SYSFS"])
def test_a_config_file_or_a_fake_host_whose_path_is_not_utf_8_is_refused_too(
    said: Said, tmp_path: Path, variable: str
) -> None:
    host = FakeNode.create(tmp_path / "\udcff", "gh200").root
    flag = "--" + variable.removeprefix("SANDBOX_PLUGIN_").lower().replace("_", "-")
    why = f"{str(host)!r} is not UTF-8, as a path must be here"
    assert said(f"{flag}={host}") == (2, f"{flag}: {why}")
    assert said(**{variable: str(host)}) == (2, f"{variable}: {why}")


def test_a_kubelet_folder_may_be_absent_and_must_leave_room_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    longest = "/" + "x" * 87
    assert load_settings({"kubelet_dir": longest}, {}).kubelet_dir == Path(longest)
    room = "at most 88 are allowed, so that the names of sockets fit behind it"
    assert refused({"kubelet_dir": f"{longest}x"}) == f"--kubelet-dir: the path has 89 bytes; {room}"
    monkeypatch.chdir(tmp_path)  # a path of any length would not do
    assert refused({"kubelet_dir": "file"}) == "--kubelet-dir: file is not a folder"


# Where a value comes from


CLASHES = [
    (["--gpu-alias=xx", "--nvswitch-alias=xx"], {}, "", "--gpu-alias and --nvswitch-alias are both 'xx'"),
    (["--gpu-alias=nvswitch"], {}, "", "--gpu-alias and the default of --nvswitch-alias are both 'nvswitch'"),
    ([], {"NVSWITCH_ALIAS": "pgpu"}, "", "the default of --gpu-alias and NVSWITCH_ALIAS are both 'pgpu'"),
    (
        ["--gpu-alias=yy"],
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


def test_a_models_name_may_be_an_alias_where_no_model_has_a_resource_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "plugin.toml"
    file.write_text('[names]\n"10de:2330" = "pgpu"')
    assert load_settings({"config": str(file)}, {}).gpu_alias == "pgpu"
    assert load_settings({"config": str(file), "gpu_alias": ""}, {}).gpu_alias == ""


def test_an_empty_name_of_a_config_file_is_refused_as_a_flag(said: Said) -> None:
    assert said("--config=") == (2, "--config: '' is not a path")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('gpu-alias = "9"', "gpu-alias: '9' is not a valid resource name"),
        ("health-interval = 0", "health-interval: '0' is not a"),
    ],
)
def test_a_wrong_value_in_the_config_file_is_refused_also_where_it_would_not_count(
    said: Said, tmp_path: Path, text: str, why: str
) -> None:
    file = tmp_path / "plugin.toml"
    file.write_text(text)
    status, line = said(f"--config={file}", "--gpu-alias=x", SANDBOX_PLUGIN_HEALTH_INTERVAL="1")
    assert status == 2
    assert line.startswith(f"config file {file}: {why}")
