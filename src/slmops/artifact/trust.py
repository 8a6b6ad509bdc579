"""Signing and checking releases with TUF (The Update Framework), bytes in and bytes out.

Roles: **root** and **targets** (the release key) are offline, held by people; **snapshot** and **timestamp**
are the control plane's online keys. A stolen control plane can therefore only choose among releases that were
properly signed.

Source: TUF specification 1.0.33, sections 4 (formats) and 5 (client workflow). Device-side checking is
python-tuf's own client (``agent/release_source.py``); this module makes metadata and lets a control plane
check what is uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from slmops.core.errors import ConflictError, DowngradeError, NotFoundError, SignatureError, TrustError

ROOT_VALID = timedelta(days=3650)
TARGETS_VALID = timedelta(days=3650)
SNAPSHOT_VALID = timedelta(days=90)
TIMESTAMP_VALID = timedelta(days=14)

_SERIALIZER = JSONSerializer(compact=True, validate=True)


def new_root(
    root_signers: Sequence[Signer],
    release_keys: Sequence[Key],
    online_keys: Sequence[Key],
    now: datetime,
    *,
    thresholds: tuple[int, int] = (1, 1),
) -> bytes:
    """Version 1 of the root metadata, signed by the root keys.

    Args:
        root_signers: the root role's keys.
        release_keys: public keys of the targets role.
        online_keys: public keys of the control plane, for snapshot and timestamp.
        now: UTC.
        thresholds: signatures needed for root and for releases.
    """
    root = Root(version=1, expires=_date(now + ROOT_VALID), consistent_snapshot=True)
    for signer in root_signers:
        root.add_key(signer.public_key, Root.type)
    for key in release_keys:
        root.add_key(key, Targets.type)
    for key in online_keys:
        root.add_key(key, Snapshot.type)
        root.add_key(key, Timestamp.type)
    root.roles[Root.type].threshold = thresholds[0]
    root.roles[Targets.type].threshold = thresholds[1]
    metadata = Metadata(root)
    for signer in root_signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(_SERIALIZER)


def new_targets(signers: Sequence[Signer], now: datetime) -> bytes:
    """Empty targets metadata, version 1, signed by the release keys."""
    metadata = Metadata(Targets(version=1, expires=_date(now + TARGETS_VALID)))
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(_SERIALIZER)


def add_release(
    targets: bytes,
    target_path: str,
    manifest: bytes,
    release_seq: int,
    signers: Sequence[Signer],
    now: datetime,
) -> bytes:
    """The next version of the targets metadata, with one more release.

    Raises:
        ConflictError: the path is taken by other bytes: a published version never changes.
        DowngradeError: ``release_seq`` is not above that of every release of the same model.
    """
    metadata = load_targets(targets)
    existing = metadata.signed.targets.get(target_path)
    new = TargetFile.from_data(target_path, manifest, ["sha256"])
    new.unrecognized_fields["custom"] = {"release_seq": release_seq}
    if existing is not None and existing != new:
        raise ConflictError(
            f"{target_path} is already released with sha256 {existing.hashes['sha256']}",
            hint="a version and its release_seq never change: choose the next --version",
        )
    model_prefix = target_path.rsplit("/", 1)[0] + "/"
    highest = max(
        (release_seq_of(t) for path, t in metadata.signed.targets.items() if path.startswith(model_prefix)),
        default=0,
    )
    if existing is None and release_seq <= highest:
        raise DowngradeError(
            f"release_seq {release_seq} is not above {highest}", hint="let release create choose the number"
        )
    metadata.signed.targets[target_path] = new
    metadata.signed.version += 1
    metadata.signed.expires = _date(now + TARGETS_VALID)
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(_SERIALIZER)


def release_seq_of(target: TargetFile) -> int:
    """The signed ``release_seq`` of a target; 0 when it has none."""
    custom = target.unrecognized_fields.get("custom", {})
    seq = custom.get("release_seq", 0) if isinstance(custom, dict) else 0
    return seq if isinstance(seq, int) else 0


def check_root(content: bytes) -> Metadata[Root]:
    """Read root metadata and check that it is signed by its own root role.

    Raises:
        SignatureError: it is not.
        TrustError: it cannot be read.
    """
    metadata = _load(content, Root, "root.json")
    _verify(metadata.signed, Root.type, metadata, "root.json")
    return metadata


def check_targets(
    root: Metadata[Root], content: bytes, *, previous: bytes | None = None
) -> Metadata[Targets]:
    """Read targets metadata and check that it is signed by the release keys and moves forward.

    Args:
        root: trusted root.
        content: the new metadata.
        previous: what is published now. A newer statement must keep all of its targets unchanged. An older one is fine when
            the published one still says all of it: a release that was signed earlier and is published later, or again.

    Raises:
        SignatureError: wrong or too few signatures.
        DowngradeError: it goes back behind what is published.
    """
    metadata = _load(content, Targets, "targets.json")
    _verify(root.signed, Targets.type, metadata, "targets.json")
    if previous is not None:
        published = load_targets(previous).signed
        if metadata.signed.version < published.version:
            for path, target in metadata.signed.targets.items():
                if published.targets.get(path) != target:
                    raise DowngradeError(
                        f"targets.json version {metadata.signed.version} is below the published {published.version}, "
                        f"which does not name {path} like this",
                        hint="it was signed in another workspace: sign the release again with the keys and the targets "
                        "that this control plane's releases come from",
                    )
            return metadata
        if metadata.signed.version == published.version and metadata.signed != published:
            # Devices that hold this version would never look again.
            raise DowngradeError(
                f"targets.json version {published.version} is already published with other content",
                hint="fetch the published targets, add the release to those and sign again",
            )
        for path, target in published.targets.items():
            if metadata.signed.targets.get(path) != target:
                raise DowngradeError(
                    f"targets.json drops or changes the published {path}",
                    hint="releases are recalled, never removed",
                )
    return metadata


def load_targets(content: bytes) -> Metadata[Targets]:
    """Read targets metadata without checking its signatures."""
    return _load(content, Targets, "targets.json")


def publish(
    root: Metadata[Root],
    targets: bytes,
    previous_snapshot: bytes | None,
    previous_timestamp: bytes | None,
    online: Signer,
    now: datetime,
) -> dict[str, bytes]:
    """Snapshot and timestamp for new targets, signed with the online key.

    Args:
        root: trusted root; the online key must be one of its snapshot keys.
        targets: checked targets metadata.
        previous_snapshot: published snapshot, or None at first; ``previous_timestamp`` likewise.
        previous_timestamp: published timestamp, or None at first.
        online: the control plane's key.
        now: UTC.

    Returns:
        File name to bytes, as ``GET /v1/tuf/{file}`` serves them (consistent snapshots: version prefixes).
    """
    if online.public_key.keyid not in root.signed.roles[Snapshot.type].keyids:
        raise SignatureError(
            "the control plane's online key is not in root.json",
            hint="run 'slmops keys init' with this server's --data-dir, or sign a new root with its key",
        )
    version = load_targets(targets).signed.version
    snapshot_version = (
        1
        if previous_snapshot is None
        else _load(previous_snapshot, Snapshot, "snapshot.json").signed.version + 1
    )
    timestamp_version = (
        1
        if previous_timestamp is None
        else _load(previous_timestamp, Timestamp, "timestamp.json").signed.version + 1
    )
    snapshot = Metadata(
        Snapshot(
            version=snapshot_version,
            expires=_date(now + SNAPSHOT_VALID),
            meta={"targets.json": MetaFile(version)},
        )
    )
    snapshot.sign(online)
    snapshot_bytes = snapshot.to_bytes(_SERIALIZER)
    timestamp = Metadata(
        Timestamp(
            version=timestamp_version,
            expires=_date(now + TIMESTAMP_VALID),
            snapshot_meta=MetaFile.from_data(snapshot_version, snapshot_bytes, ["sha256"]),
        )
    )
    timestamp.sign(online)
    return {
        f"{version}.targets.json": targets,
        f"{snapshot_version}.snapshot.json": snapshot_bytes,
        "timestamp.json": timestamp.to_bytes(_SERIALIZER),
    }


def target_digest(targets: bytes, target_path: str) -> str:
    """SHA-256 of a target.

    Raises:
        NotFoundError: there is no such target.
    """
    target = load_targets(targets).signed.targets.get(target_path)
    if target is None:
        raise NotFoundError(
            f"{target_path} is not in targets.json", hint="slmops release list shows what is released"
        )
    return target.hashes["sha256"]


def _date(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)


def _load(content: bytes, kind: type, name: str) -> Metadata:  # type: ignore[type-arg]
    try:
        metadata = Metadata.from_bytes(content)
    except DeserializationError as error:
        raise TrustError(
            f"{name} cannot be read: {error}", hint="the file is damaged or is no TUF metadata"
        ) from error
    if not isinstance(metadata.signed, kind):
        raise TrustError(
            f"{name} is {metadata.signed.type} metadata, expected {kind.__name__.lower()}",
            hint="give the right file",
        )
    return metadata


def _verify(signed: Root, role: str, metadata: Metadata, name: str) -> None:  # type: ignore[type-arg]
    try:
        signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, DownloadError, ValueError) as error:
        raise SignatureError(
            f"{name}: {error}", hint="sign it with the keys that root.json names for this role"
        ) from error
