"""The offline keys: made once, encrypted by a passphrase, kept in the user's config folder and nowhere else.

    <workspace>/root.pem, release.pem    P-256 private keys, PKCS #8, encrypted; mode 0600
    <workspace>/root.json                the signed root metadata
    <workspace>/targets.json             what was signed so far; the next release is added to it
    <workspace>/released.json            what was released, in one line each (a convenience: targets.json is the authority)
    <server data>/keys/online.pem        the control plane's own key: snapshot and timestamp only; mode 0600, not encrypted
    <server data>/tuf/1.root.json, 1.targets.json

A passphrase comes from ``$SLMOPS_PASSPHRASE`` or a prompt, never from the command line, and is never logged.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root, Snapshot, Targets

from slmops.artifact.trust import check_root, new_root, new_targets
from slmops.core.errors import AuthError, ConflictError, NotFoundError, TrustError, UsageError
from slmops.release.files import write_whole

PASSPHRASE_VARIABLE = "SLMOPS_PASSPHRASE"
ROOT_KEY, RELEASE_KEY = "root.pem", "release.pem"
ROOT_METADATA, TARGETS_METADATA, RELEASED = "root.json", "targets.json", "released.json"


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key.

    Attributes:
        role: ``root``, ``release`` or ``online``.
        keyid: as in the metadata.
        place: file, for people.
        offline: whether it is kept apart from the control plane.
    """

    role: str
    keyid: str
    place: str
    offline: bool


@dataclass(frozen=True, slots=True)
class KeysReport:
    """What :func:`init_keys` made."""

    keys: tuple[KeyEntry, ...]
    workspace: str
    server_data_dir: str


class ReleaseEntry(msgspec.Struct, frozen=True):
    """One line of what was released; ``golden_prompts`` and ``golden_max_drop_ratio`` tell whether a later pack is weaker."""

    model: str
    version: str
    release_seq: int
    sha256: str
    created: str
    golden_prompts: int
    golden_max_drop_ratio: float


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder of the offline keys.

    Attributes:
        path: need not exist before :func:`init_keys`.
    """

    path: Path

    @staticmethod
    def default() -> Workspace:
        """``$XDG_CONFIG_HOME/slmops/keys``, or ``~/.config/slmops/keys``."""
        config = os.environ.get("XDG_CONFIG_HOME")
        return Workspace((Path(config) if config else Path.home() / ".config") / "slmops" / "keys")

    def read(self, name: str) -> bytes:
        """One of the workspace's files.

        Raises:
            NotFoundError: there is none.
        """
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{self.path} has no {name}",
                hint="make keys first: slmops keys init --server-data DIR, or give --keys FOLDER",
            ) from error

    def released(self) -> tuple[ReleaseEntry, ...]:
        """What was released from here, oldest first."""
        try:
            return msgspec.json.decode((self.path / RELEASED).read_bytes(), type=tuple[ReleaseEntry, ...])
        except FileNotFoundError:
            return ()
        except msgspec.MsgspecError as error:
            raise TrustError(
                f"{self.path / RELEASED} cannot be read: {error}",
                hint="restore it from a backup, or remove it: targets.json is the authority",
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else signs meanwhile."""
        self.read(ROOT_METADATA)
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def read_passphrase(prompt: Callable[[str], str]) -> str:
    """The passphrase from the environment, else asked for.

    Raises:
        UsageError: it is empty.
    """
    passphrase = os.environ.get(PASSPHRASE_VARIABLE) or prompt("Passphrase of the offline keys")
    if not passphrase:
        raise UsageError("the passphrase is empty", hint=f"set {PASSPHRASE_VARIABLE}, or type one")
    return passphrase


def init_keys(workspace: Workspace, server_data_dir: Path, passphrase: str, now: datetime) -> KeysReport:
    """Make root, release and online keys, and sign the first metadata. Never overwrites anything.

    Args:
        workspace: gets the offline keys.
        server_data_dir: the control plane's data folder: gets its online key, root and empty targets.
        passphrase: encrypts the offline keys.
        now: UTC.

    Raises:
        ConflictError: there are keys in one of the two places.
        UsageError: the passphrase is empty, the time is not aware, or a folder cannot be written.
    """
    if not passphrase:
        raise UsageError("the passphrase is empty", hint=f"set {PASSPHRASE_VARIABLE}, or type one")
    if now.tzinfo is None:
        raise UsageError("the time has no time zone", hint="give an aware UTC time")
    server_files = {
        name: server_data_dir / name for name in ("keys/online.pem", "tuf/1.root.json", "tuf/1.targets.json")
    }
    taken = [
        path
        for path in (
            workspace.path / ROOT_KEY,
            workspace.path / RELEASE_KEY,
            workspace.path / ROOT_METADATA,
            *server_files.values(),
        )
        if path.exists()
    ]
    if taken:
        raise ConflictError(
            f"{taken[0]} exists already: keys are never overwritten",
            hint="use the keys that are there, or give another --keys and --server-data folder",
        )
    root, release, online = (CryptoSigner.generate_ecdsa() for _ in range(3))
    root_metadata = new_root([root], [release.public_key], [online.public_key], now)
    targets_metadata = new_targets([release], now)
    offline = {
        ROOT_KEY: _pem(root, passphrase),
        RELEASE_KEY: _pem(release, passphrase),
        ROOT_METADATA: root_metadata,
        TARGETS_METADATA: targets_metadata,
    }
    server = {
        "keys/online.pem": _pem(online, None),
        "tuf/1.root.json": root_metadata,
        "tuf/1.targets.json": targets_metadata,
    }
    written: list[Path] = []
    try:
        for name, path in server_files.items():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(path, server[name], mode=0o600)
            written.append(path)
        _place(workspace.path, offline)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, PermissionError):
            raise UsageError(
                f"{error.filename}: {error.strerror}", hint="choose folders that you may write to"
            ) from error
        raise
    return KeysReport(
        (
            KeyEntry("root", root.public_key.keyid, str(workspace.path / ROOT_KEY), True),
            KeyEntry("release", release.public_key.keyid, str(workspace.path / RELEASE_KEY), True),
            KeyEntry("online", online.public_key.keyid, str(server_files["keys/online.pem"]), False),
        ),
        str(workspace.path),
        str(server_data_dir),
    )


def list_keys(workspace: Workspace) -> tuple[KeyEntry, ...]:
    """The keys that the workspace's root names; empty when there are none yet."""
    if not (workspace.path / ROOT_METADATA).is_file():
        return ()
    root = check_root(workspace.read(ROOT_METADATA)).signed
    entries = []
    for role, metadata_role, place in (
        ("root", Root.type, str(workspace.path / ROOT_KEY)),
        ("release", Targets.type, str(workspace.path / RELEASE_KEY)),
        ("online", Snapshot.type, "the control plane's data folder: keys/online.pem"),
    ):
        entries += [
            KeyEntry(role, keyid, place, role != "online") for keyid in root.roles[metadata_role].keyids
        ]
    return tuple(entries)


def list_releases(workspace: Workspace) -> tuple[ReleaseEntry, ...]:
    """What was released from this workspace, oldest first."""
    return workspace.released()


def open_release_key(workspace: Workspace, passphrase: str) -> CryptoSigner:
    """Decrypt the release key.

    Raises:
        NotFoundError: there is none.
        AuthError: the passphrase is wrong.
        TrustError: the file is damaged, or its key is not the one that root names.
    """
    content = workspace.read(RELEASE_KEY)
    path = workspace.path / RELEASE_KEY
    try:
        private = load_pem_private_key(content, passphrase.encode())
    except ValueError as error:
        if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" not in content:
            raise TrustError(
                f"{path} is no encrypted private key", hint="restore it from your backup"
            ) from error
        raise AuthError(
            f"{path} does not open: the passphrase is wrong",
            hint=f"set {PASSPHRASE_VARIABLE} to the passphrase that 'slmops keys init' was given",
        ) from error
    except (TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(
            f"{path} is no encrypted P-256 key: {error}", hint="restore it from your backup"
        ) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise TrustError(
            f"{path} holds a {type(private).__name__}, expected P-256", hint="restore it from your backup"
        )
    signer = CryptoSigner(private)
    named = check_root(workspace.read(ROOT_METADATA)).signed.roles[Targets.type].keyids
    if signer.public_key.keyid not in named:
        raise TrustError(
            f"{path}: key {signer.public_key.keyid[:16]} is not the release key that root.json names",
            hint="use the workspace that this root was made in",
        )
    return signer


def _pem(signer: CryptoSigner, passphrase: str | None) -> bytes:
    """A private key as PKCS #8."""
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase.encode())
    private = load_pem_private_key(signer.private_bytes, None)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def _place(folder: Path, files: dict[str, bytes]) -> None:
    """All files at once where the folder is new, else one after another, the metadata last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        for name, content in files.items():
            write_whole(folder / name, content, mode=0o600)
        folder.chmod(0o700)
        return
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # mode 0700
    try:
        for name, content in files.items():
            write_whole(staging / name, content, mode=0o600)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
