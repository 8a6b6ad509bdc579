"""Offline keys: encrypted, private, never overwritten, and of no use without their passphrase."""

from __future__ import annotations

import stat
from datetime import datetime, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from slmops.artifact.trust import check_root, check_targets, load_targets
from slmops.core.errors import AuthError, ConflictError, NotFoundError, TrustError, UsageError
from slmops.release import Workspace, init_keys, list_keys, list_releases, read_passphrase
from slmops.release.keys import open_release_key

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Workspace, Path]:
    workspace, server = Workspace(tmp_path / "config" / "keys"), tmp_path / "server"
    init_keys(workspace, server, "a passphrase", NOW)
    return workspace, server


def test_three_keys_in_two_places(place: tuple[Workspace, Path]) -> None:
    """Root and release stay with the person, the online key with the server; the metadata verifies."""
    workspace, server = place
    keys = list_keys(workspace)
    assert [(key.role, key.offline) for key in keys] == [("root", True), ("release", True), ("online", False)]
    assert len({key.keyid for key in keys}) == 3
    root = check_root(workspace.read("root.json"))
    assert root.signed.roles["targets"].keyids == [keys[1].keyid]
    assert root.signed.roles["timestamp"].keyids == root.signed.roles["snapshot"].keyids == [keys[2].keyid]
    assert check_targets(root, workspace.read("targets.json")).signed.targets == {}
    assert (server / "tuf" / "1.root.json").read_bytes() == workspace.read("root.json")
    assert (server / "tuf" / "1.targets.json").read_bytes() == workspace.read("targets.json")
    assert sorted(path.name for path in server.rglob("*") if path.is_file()) == [
        "1.root.json",
        "1.targets.json",
        "online.pem",
    ]
    assert list_releases(workspace) == ()


def test_files_are_private_and_encrypted(place: tuple[Workspace, Path]) -> None:
    """Mode 0600 in a folder of mode 0700; the offline keys do not open without a passphrase; all are P-256."""
    workspace, server = place
    assert stat.S_IMODE(workspace.path.stat().st_mode) == 0o700
    for path in (*workspace.path.glob("*.*"), server / "keys" / "online.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for name in ("root.pem", "release.pem"):
        content = (workspace.path / name).read_bytes()
        with pytest.raises(TypeError):
            load_pem_private_key(content, None)
        key = load_pem_private_key(content, b"a passphrase")
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp256r1"
    assert load_pem_private_key((server / "keys" / "online.pem").read_bytes(), None)


def test_the_wrong_passphrase_opens_nothing(place: tuple[Workspace, Path]) -> None:
    """A named error with exit code 4, and no word of the passphrase in it."""
    workspace, _ = place
    with pytest.raises(AuthError, match="passphrase is wrong") as caught:
        open_release_key(workspace, "my secret guess")
    assert caught.value.exit_code == 4
    assert "my secret guess" not in str(caught.value)
    assert open_release_key(workspace, "a passphrase").public_key.keyid == list_keys(workspace)[1].keyid


@pytest.mark.parametrize("where", ["same workspace", "same server"])
def test_keys_are_never_overwritten(place: tuple[Workspace, Path], tmp_path: Path, where: str) -> None:
    """Either place having keys refuses the whole, and nothing of the other place is written."""
    workspace, server = place
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = Workspace(tmp_path / "other"), tmp_path / "server-2"
    arguments = (workspace, other[1]) if where == "same workspace" else (other[0], server)
    with pytest.raises(ConflictError, match="never overwritten"):
        init_keys(*arguments, "another", NOW)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_swapped_key_is_noticed(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    """A release key that root does not name signs nothing, nor does a damaged one."""
    workspace, _ = place
    stranger = Workspace(tmp_path / "stranger")
    init_keys(stranger, tmp_path / "server-2", "a passphrase", NOW)
    (workspace.path / "release.pem").write_bytes(stranger.read("release.pem"))
    with pytest.raises(TrustError, match="not the release key"):
        open_release_key(workspace, "a passphrase")
    (workspace.path / "release.pem").write_bytes(b"garbage")
    with pytest.raises(TrustError, match="no encrypted private key"):
        open_release_key(workspace, "a passphrase")


def test_inputs_that_cannot_be_right(tmp_path: Path) -> None:
    """No passphrase, a time without zone: refused before anything is written."""
    with pytest.raises(UsageError, match="empty"):
        init_keys(Workspace(tmp_path / "k"), tmp_path / "s", "", NOW)
    with pytest.raises(UsageError, match="time zone"):
        init_keys(Workspace(tmp_path / "k"), tmp_path / "s", "x", datetime(2026, 1, 1))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFoundError, match="slmops keys init"):
        open_release_key(Workspace(tmp_path / "k"), "x")
    assert list_keys(Workspace(tmp_path / "k")) == ()


def test_where_a_passphrase_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment first, else a question; an empty answer is none."""
    monkeypatch.setenv("SLMOPS_PASSPHRASE", "from the environment")
    assert read_passphrase(lambda prompt: pytest.fail("asked")) == "from the environment"
    monkeypatch.delenv("SLMOPS_PASSPHRASE")
    assert read_passphrase(lambda prompt: "typed") == "typed"
    with pytest.raises(UsageError, match="empty"):
        read_passphrase(lambda prompt: "")


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's config folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Workspace.default().path == tmp_path / "slmops" / "keys"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert Workspace.default().path == Path.home() / ".config" / "slmops" / "keys"


def test_targets_begin_empty(place: tuple[Workspace, Path]) -> None:
    """Version 1 without a target."""
    signed = load_targets(place[0].read("targets.json")).signed
    assert (signed.version, signed.targets) == (1, {})
