"""Signing and checking with TUF: what a release needs, and that python-tuf's own client accepts the result."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf_world import NOW, World, new_key

from slmops.artifact import trust
from slmops.core.errors import ConflictError, DowngradeError, NotFoundError, SignatureError, TrustError


def test_the_roles_are_apart() -> None:
    """Root and release keys are offline; the control plane's key can sign snapshot and timestamp only."""
    world = World()
    root = trust.check_root(world.root)
    roles = {name: set(role.keyids) for name, role in root.signed.roles.items()}
    online = {world.online.public_key.keyid}
    assert roles == {
        Root.type: {signer.public_key.keyid for signer in world.root_signers},
        Targets.type: {signer.public_key.keyid for signer in world.release_signers},
        Snapshot.type: online,
        Timestamp.type: online,
    }
    assert root.signed.consistent_snapshot
    assert (root.signed.version, root.signed.expires) == (1, NOW + trust.ROOT_VALID)


def test_a_device_sees_what_was_released(tmp_path: Path) -> None:
    """A real tuf.ngclient.Updater, with an empty cache and only the root pinned, finds release and its bytes."""
    world = World()
    world.release("releases/m/1.0.0.json", b"manifest one", 1)
    world.release("releases/m/1.1.0.json", b"manifest two", 2)
    device = world.device(tmp_path)
    found = device.find("releases/m/1.1.0.json")
    assert found is not None
    assert found.hashes == {"sha256": trust.target_digest(world.targets, "releases/m/1.1.0.json")}
    assert trust.release_seq_of(found) == 2
    assert device.find("releases/m/9.9.9.json") is None


def test_a_device_follows_from_version_to_version(tmp_path: Path) -> None:
    """The same device, refreshed after each publication, sees each new release."""
    world, path = World(), "releases/m/{}.json"
    device = world.device(tmp_path)
    for number in range(1, 5):
        world.release(path.format(number), f"manifest {number}".encode(), number)
        assert device.find(path.format(number)) is not None
    assert sorted(trust.load_targets(world.targets).signed.targets) == [path.format(n) for n in range(1, 5)]


def test_republishing_keeps_old_releases_fresh(tmp_path: Path) -> None:
    """Only snapshot and timestamp move; the offline signature stays."""
    world = World()
    world.release("releases/m/1.json", b"one", 1)
    device = world.device(tmp_path)
    device.find("releases/m/1.json")
    targets = world.targets
    world.publish(now=NOW + timedelta(days=10))
    assert world.targets == targets
    assert device.find("releases/m/1.json", now=NOW + timedelta(days=20)) is not None
    timestamp = Metadata.from_bytes(world.files["timestamp.json"]).signed
    assert (timestamp.version, timestamp.expires) == (3, NOW + timedelta(days=10) + trust.TIMESTAMP_VALID)


def test_a_version_never_changes() -> None:
    world = World()
    world.release("releases/m/1.json", b"one", 1)
    with pytest.raises(ConflictError, match="already released with sha256"):
        trust.add_release(world.targets, "releases/m/1.json", b"other", 2, world.release_signers, NOW)
    with pytest.raises(ConflictError):
        trust.add_release(world.targets, "releases/m/1.json", b"one", 2, world.release_signers, NOW)
    again = trust.add_release(world.targets, "releases/m/1.json", b"one", 1, world.release_signers, NOW)
    assert trust.load_targets(again).signed.targets == trust.load_targets(world.targets).signed.targets


def test_release_seq_orders_the_releases_of_one_model() -> None:
    """The version string is only a label: 0.9 may follow 1.0, but its number must be higher."""
    world = World()
    world.release("releases/m/1.0.json", b"one", 5)
    for seq in (5, 4, 0, -1):
        with pytest.raises(DowngradeError, match=rf"release_seq {seq} is not above 5"):
            trust.add_release(world.targets, "releases/m/0.9.json", b"two", seq, world.release_signers, NOW)
    world.release("releases/m/0.9.json", b"two", 6)
    world.release("releases/other/1.0.json", b"three", 1)
    with pytest.raises(DowngradeError, match="0 is not above 0"):
        trust.add_release(world.targets, "releases/third/1.json", b"x", 0, world.release_signers, NOW)


@pytest.mark.parametrize(
    ("custom", "seq"), [({"release_seq": 3}, 3), ({"release_seq": "3"}, 0), ([], 0), ({}, 0)]
)
def test_a_target_without_a_sequence_counts_as_zero(custom: object, seq: int) -> None:
    world = World()
    world.release("releases/m/1.json", b"one", 1)
    target = trust.load_targets(world.targets).signed.targets["releases/m/1.json"]
    target.unrecognized_fields["custom"] = custom
    assert trust.release_seq_of(target) == seq


def test_thresholds_ask_for_several_people() -> None:
    """With two of two, one release key alone signs nothing that is believed."""
    one, two = new_key(), new_key()
    world = World(release_signers=[one, two], thresholds=(1, 2))
    world.release("releases/m/1.json", b"one", 1)
    root = trust.check_root(world.root)
    alone = trust.add_release(world.targets, "releases/m/2.json", b"two", 2, [one], NOW)
    with pytest.raises(SignatureError, match=r"targets\.json: .*1/2"):
        trust.check_targets(root, alone, previous=world.targets)
    twice = trust.add_release(world.targets, "releases/m/2.json", b"two", 2, [one, one], NOW)
    with pytest.raises(SignatureError):
        trust.check_targets(root, twice, previous=world.targets)


def test_the_same_targets_may_be_uploaded_twice() -> None:
    """Publishing is safe to repeat, also with a fresh signature over the same content."""
    world = World()
    world.release("releases/m/1.json", b"one", 1)
    root = trust.check_root(world.root)
    assert trust.check_targets(root, world.targets).signed.version == 2
    trust.check_targets(root, world.targets, previous=world.targets)
    resigned = trust.load_targets(world.targets)
    resigned.signatures.clear()
    resigned.sign(world.release_signers[0])
    trust.check_targets(root, resigned.to_bytes(), previous=world.targets)


def test_the_first_targets_are_empty() -> None:
    world = World()
    targets = trust.load_targets(trust.new_targets(world.release_signers, NOW)).signed
    assert (targets.version, targets.targets, targets.expires) == (1, {}, NOW + trust.TARGETS_VALID)


def test_an_unknown_target_is_not_found() -> None:
    world = World()
    with pytest.raises(NotFoundError, match=r"releases/m/1\.json is not in targets\.json"):
        trust.target_digest(world.targets, "releases/m/1.json")


def test_a_control_plane_that_root_does_not_know_cannot_publish() -> None:
    """It says so before anything is written, and how to mend it."""
    world = World()
    with pytest.raises(SignatureError, match="online key is not in root") as caught:
        trust.publish(trust.check_root(world.root), world.targets, None, None, new_key(), NOW)
    assert "keys init" in caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"signed":{"_type":"targets"}}', b"[" * 100_000]
)
def test_what_is_no_metadata_is_a_trust_error(content: bytes) -> None:
    root = trust.check_root(World().root)
    for read in (trust.check_root, trust.load_targets, lambda bad: trust.check_targets(root, bad)):
        with pytest.raises(TrustError, match="cannot be read"):
            read(content)


def test_the_wrong_kind_of_metadata_is_named() -> None:
    world = World()
    with pytest.raises(TrustError, match=r"root\.json is targets metadata, expected root"):
        trust.check_root(world.targets)
    with pytest.raises(TrustError, match=r"targets\.json is root metadata, expected targets"):
        trust.load_targets(world.root)
    with pytest.raises(TrustError, match=r"snapshot\.json is targets metadata"):
        trust.publish(trust.check_root(world.root), world.targets, world.targets, None, world.online, NOW)
