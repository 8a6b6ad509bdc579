"""Attacks on the way from the release key to the device, each with a real python-tuf client as the victim.

After each one the device still trusts exactly what it trusted before.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Targets
from tuf_world import NOW, Device, World, new_key

from slmops.artifact import trust
from slmops.core.errors import DowngradeError, SignatureError, TrustError

PATH = "releases/m/{}.json"


@pytest.fixture
def world() -> World:
    world = World()
    world.release(PATH.format(1), b"one", 1)
    world.release(PATH.format(2), b"two", 2)
    return world


@pytest.fixture
def device(world: World, tmp_path: Path) -> Device:
    """A device that has seen both releases."""
    device = world.device(tmp_path)
    assert device.find(PATH.format(2)) is not None
    return device


def trusted(device: Device) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in device.folder.glob("*.json")}


def refuses(device: Device, error: type[Exception] | tuple[type[Exception], ...]) -> None:
    """The refresh fails, and nothing that the device trusted has changed but for the step before the failure."""
    before = trusted(device)
    with pytest.raises(error):
        device.find(PATH.format(2))
    after = trusted(device)
    assert after["targets.json"] == before["targets.json"]
    assert after["root.json"] == before["root.json"]


# ---- at the device ---------------------------------------------------------------------------------------------


def test_a_stolen_control_plane_cannot_add_a_release(world: World, device: Device) -> None:
    """It has the online key, so snapshot and timestamp are good; the targets are signed by nobody that counts."""
    world.targets = trust.add_release(world.targets, PATH.format(3), b"evil", 3, [world.online], NOW)
    world.publish()
    refuses(device, UnsignedMetadataError)


def test_an_unsigned_change_of_a_target(world: World, device: Device) -> None:
    """Same signatures, other bytes."""
    forged = json.loads(world.targets)
    forged["signed"]["targets"][PATH.format(2)]["hashes"]["sha256"] = "0" * 64
    forged["signed"]["version"] += 1
    world.targets = json.dumps(forged).encode()
    world.publish()
    refuses(device, UnsignedMetadataError)


def test_another_operators_world(world: World, device: Device) -> None:
    """A complete, well-signed repository under other keys, even with a higher version of everything."""
    other = World()
    for number in range(1, 9):
        other.release(PATH.format(number), b"evil", number)
    device.world = other
    refuses(device, UnsignedMetadataError)


def test_below_the_threshold(tmp_path: Path) -> None:
    """Two of two must sign; a control plane that skipped its own check is still refused by the device."""
    one, two = new_key(), new_key()
    world = World(release_signers=[one, two], thresholds=(1, 2))
    world.release(PATH.format(2), b"two", 2)
    device = world.device(tmp_path)
    assert device.find(PATH.format(2)) is not None
    world.targets = trust.add_release(world.targets, PATH.format(3), b"evil", 3, [one], NOW)
    world.publish()
    refuses(device, UnsignedMetadataError)


def test_rollback_of_everything(world: World, device: Device) -> None:
    """The server is put back to an older, properly signed state."""
    old = World.__new__(World)
    old.files = {"1.root.json": world.root}
    targets = trust.new_targets(world.release_signers, NOW)
    old.files.update(trust.publish(trust.check_root(world.root), targets, None, None, world.online, NOW))
    device.world = old
    refuses(device, BadVersionNumberError)


def test_rollback_of_the_targets_alone(world: World, device: Device) -> None:
    """Fresh snapshot and timestamp that name an older targets version."""
    first = next(name for name in world.files if name == "2.targets.json")
    world.targets = world.files[first]
    world.publish()
    refuses(device, BadVersionNumberError)


def test_mix_and_match(world: World, device: Device) -> None:
    """The targets file of one moment under the snapshot of another."""
    third = trust.add_release(world.targets, PATH.format(3), b"three", 3, world.release_signers, NOW)
    world.targets = third
    world.publish()
    version = trust.load_targets(third).signed.version
    world.files[f"{version}.targets.json"] = world.files[f"{version - 1}.targets.json"]
    refuses(device, BadVersionNumberError)


def test_a_swapped_snapshot(world: World, device: Device) -> None:
    """The timestamp names the snapshot by its hash."""
    world.publish()
    newest = max(
        (name for name in world.files if name.endswith("snapshot.json")), key=lambda n: int(n.split(".")[0])
    )
    other = Metadata.from_bytes(world.files[newest])
    other.signed.expires += timedelta(days=1)
    other.sign(world.online)
    world.files[newest] = other.to_bytes()
    refuses(
        device, (RepositoryError, DownloadLengthMismatchError)
    )  # an ECDSA signature may make it longer, too


def test_freeze(world: World, device: Device) -> None:
    """A server that stands still is noticed when its timestamp runs out; the device is told so by name."""
    with pytest.raises(ExpiredMetadataError):
        device.find(PATH.format(2), now=NOW + trust.TIMESTAMP_VALID + timedelta(seconds=1))
    assert device.find(PATH.format(2), now=NOW + trust.TIMESTAMP_VALID - timedelta(seconds=1)) is not None


def test_an_endless_file(world: World, device: Device) -> None:
    """The client stops reading at its limit instead of filling the disk."""
    world.files["timestamp.json"] += b" " * (1 << 20)
    refuses(device, DownloadLengthMismatchError)


# ---- at the control plane, before anything is published --------------------------------------------------------


def test_upload_signed_by_a_stranger(world: World) -> None:
    forged = trust.add_release(world.targets, PATH.format(3), b"evil", 3, [new_key()], NOW)
    with pytest.raises(SignatureError, match=r"targets\.json"):
        trust.check_targets(trust.check_root(world.root), forged, previous=world.targets)


def test_upload_with_a_signature_that_is_noise(world: World) -> None:
    metadata = json.loads(world.targets)
    for value in ("", "zz", "00" * 70, None, 5, {"x": 1}):
        metadata["signatures"][0]["sig"] = value
        with pytest.raises(TrustError):
            trust.check_targets(trust.check_root(world.root), json.dumps(metadata).encode())


def test_upload_that_drops_a_release(world: World) -> None:
    """Releases are recalled, never removed: devices may be running them."""
    root = trust.check_root(world.root)
    dropped = alter(world, lambda targets: targets.targets.pop(PATH.format(1)))
    with pytest.raises(DowngradeError, match=r"drops or changes the published releases/m/1\.json"):
        trust.check_targets(root, dropped, previous=world.targets)


def test_upload_that_changes_a_release(world: World) -> None:
    root = trust.check_root(world.root)

    def swap(targets: Targets) -> None:
        targets.targets[PATH.format(1)].hashes["sha256"] = "0" * 64

    with pytest.raises(DowngradeError, match="drops or changes"):
        trust.check_targets(root, alter(world, swap), previous=world.targets)


def test_upload_that_renumbers_a_release(world: World) -> None:
    """A lower release_seq under the same bytes would open the way back."""
    root = trust.check_root(world.root)

    def renumber(targets: Targets) -> None:
        targets.targets[PATH.format(2)].unrecognized_fields["custom"] = {"release_seq": 99}

    with pytest.raises(DowngradeError, match="drops or changes"):
        trust.check_targets(root, alter(world, renumber), previous=world.targets)


def test_upload_that_goes_back(world: World) -> None:
    """Below what is published, and not a part of it: signed properly, and refused."""
    foreign = trust.add_release(
        world.files["1.targets.json"], "releases/other/1.json", b"other", 1, world.release_signers, NOW
    )
    assert trust.load_targets(foreign).signed.version < trust.load_targets(world.targets).signed.version
    with pytest.raises(
        DowngradeError, match=r"version 2 is below the published 3, .* releases/other/1\.json"
    ):
        trust.check_targets(trust.check_root(world.root), foreign, previous=world.targets)


def test_upload_of_what_is_said_already(world: World) -> None:
    """Releases that were signed one after the other may be published in any order, and again: nothing goes back."""
    older = world.files["2.targets.json"]
    checked = trust.check_targets(trust.check_root(world.root), older, previous=world.targets)
    assert checked.signed.version == 2


def test_two_people_release_at_once(world: World) -> None:
    """Both start from version 3 and sign a version 4: the second is refused, or devices would never see it."""
    root = trust.check_root(world.root)
    ann = trust.add_release(world.targets, PATH.format(3), b"ann's", 3, world.release_signers, NOW)
    bob = trust.add_release(world.targets, "releases/other/1.json", b"bob's", 1, world.release_signers, NOW)
    trust.check_targets(root, ann, previous=world.targets)
    with pytest.raises(DowngradeError):
        trust.check_targets(root, bob, previous=ann)
    more = trust.load_targets(ann)
    more.signed.targets["releases/other/1.json"] = trust.load_targets(bob).signed.targets[
        "releases/other/1.json"
    ]
    more.signatures.clear()
    more.sign(world.release_signers[0])
    with pytest.raises(DowngradeError, match="version 4 is already published with other content"):
        trust.check_targets(root, more.to_bytes(), previous=ann)


def test_a_root_that_is_not_signed_by_itself(world: World) -> None:
    root = Metadata.from_bytes(world.root)
    root.signed.roles["targets"].threshold = 1
    root.signed.version = 2
    with pytest.raises(SignatureError, match=r"root\.json"):
        trust.check_root(root.to_bytes())
    forged = json.loads(world.root)
    forged["signed"]["roles"]["root"]["keyids"] = []
    with pytest.raises(TrustError):
        trust.check_root(json.dumps(forged).encode())


def alter(world: World, change: object) -> bytes:
    """The next targets version with a change, signed by the real release key (a bribed or broken tool)."""
    assert callable(change)
    metadata = trust.load_targets(world.targets)
    change(metadata.signed)
    metadata.signed.version += 1
    metadata.signatures.clear()
    for signer in world.release_signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()
