"""The command line's promises: help with examples, one error form, exit codes by family."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import click
import pytest

from slmops.cli.main import NOUNS, main, root
from slmops.cli.release.create import parse_waivers
from slmops.cli.server.run import parse_listen
from slmops.core.errors import UsageError


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        main(list(arguments))
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _verbs(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    found = []
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += _verbs(child, (*path, name))
    return found


@pytest.mark.parametrize(
    ("path", "command"), _verbs(root), ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_every_verb_has_help_with_an_example(
    path: tuple[str, ...], command: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _run(capsys, *path, "--help")
    assert code == 0
    assert "Usage: slmops" in out
    examples = [
        line for line in out.splitlines() if line.startswith("    ") and f"slmops {' '.join(path)}" in line
    ]
    assert examples, "no example on a line of its own"
    assert "\\b" not in out


def test_every_noun_loads() -> None:
    context = click.Context(root)
    for noun in NOUNS:
        command = root.get_command(context, noun)  # type: ignore[attr-defined]
        assert command is not None and command.name == noun


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["agent", "nonsense"],
        ["release", "create"],
        ["server", "run"],
        ["rollout", "show", "--bad-option"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, *arguments)
    assert code == 2
    assert "Usage" in err or "Error" in err


def test_wrong_usage_is_json_when_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "release", "create", "--json")
    assert code == 2 and out == ""
    assert "BUILD" in json.loads(err)["error"]["message"]


def test_a_path_that_may_not_be_used_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder is needed stands for every folder that this user may not write to, root or not."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLMOPS_PASSPHRASE", "for this test")
    keys = ("--keys", str(tmp_path / "keys"))
    code, _, err = _run(capsys, "keys", "init", "--server-data", str(tmp_path / "file" / "data"), *keys)
    assert code == 2
    assert "bug" not in err and str(tmp_path / "file") in err


@pytest.mark.parametrize("verb", ["plan", "apply"])
def test_a_blueprint_that_is_not_utf8_is_a_named_error(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLMOPS_TOKEN", "slm_test")
    (tmp_path / "b.yaml").write_bytes(b"kind: \xff\xfe")
    code, _, err = _run(capsys, "blueprint", verb, "-f", str(tmp_path / "b.yaml"))
    assert code == 2
    assert "error[usage.document]" in err and "UTF-8" in err


def test_an_unenrolled_folder_says_how_to_enrol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "agent", "status", "--dir", str(tmp_path))
    assert code == 2
    assert "error[usage.not_found]" in err
    assert "fix: run: slmops agent enroll" in err


def test_a_profile_without_an_agent_cannot_enrol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is asked of the control plane, whose token would be spent: no such device runs the agent."""
    folder = tmp_path / "device"
    code, _, err = _run(
        capsys, "agent", "enroll", "http://127.0.0.1:9", "t", "--profile", "ios-mid", "--dir", str(folder)
    )
    assert code == 2
    assert "its profile is for exports only" in err
    assert "archives/ios-mid@*.tar" in err
    assert "pi5-8gb" in err and "android-mid" not in err
    assert not folder.exists()


def test_errors_are_json_when_json_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "agent", "status", "--dir", str(tmp_path), "--json")
    assert code == 2 and out == ""
    assert json.loads(err)["error"]["code"] == "usage.not_found"


def test_no_token_is_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    code, _, err = _run(capsys, "device", "list")
    assert code == 4
    assert "slmops server token create" in err


def test_a_token_with_odd_characters_is_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLMOPS_TOKEN", "slm_“quoted”")
    code, _, err = _run(capsys, "device", "list")
    assert code == 4 and "copy it again" in err


def test_an_unreachable_control_plane_is_exit_code_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("SLMOPS_TOKEN", "slm_test")
        code, _, err = _run(
            capsys, "device", "list", "--server", f"http://127.0.0.1:{taken.getsockname()[1]}"
        )
    assert code == 75
    assert "slmops server run" in err


def test_profiles_are_listed_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "profile", "list", "--json")
    assert code == 0
    assert {"pi-zero2-512mb", "pi5-8gb", "n100-16gb"} <= {p["name"] for p in json.loads(out)}
    code, out, _ = _run(capsys, "profile", "list")
    assert code == 0 and "pi5-8gb" in out


def test_a_waiver_needs_a_reason() -> None:
    assert parse_waivers(("kld.mean",), ("pilot",)) == {"kld.mean": "pilot"}
    for reasons in ((), ("",), ("a", "b")):
        with pytest.raises(UsageError, match="reason"):
            parse_waivers(("kld.mean",), reasons)


@pytest.mark.parametrize("listen", ["8420", "host", ":8420", "host:", "host:x"])
def test_listen_needs_host_and_port(listen: str) -> None:
    assert parse_listen("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_listen("[::1]:80") == ("::1", 80)
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_listen(listen)
