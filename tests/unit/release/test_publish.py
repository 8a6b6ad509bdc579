"""Publishing sends what is missing, once, in an order that survives being stopped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import pytest
from tests.support.build_directory import make_build_directory

from slmops.artifact.digest import sha256_hex
from slmops.core.errors import DigestError, NetworkError
from slmops.release import PublishEvent, ReleaseBundle, Workspace, create_release, init_keys, publish

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)


class Shelf:
    """A control plane in memory that may break off."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.published: list[tuple[str, bytes, bytes]] = []
        self.puts = 0
        self.breaks_after = breaks_after

    def missing_blobs(self, digests: Sequence[str]) -> list[str]:
        return [digest for digest in digests if digest not in self.blobs]

    def put_blob(self, sha256: str, content: bytes) -> None:
        if self.breaks_after is not None and self.puts >= self.breaks_after:
            raise NetworkError("gone")
        assert sha256_hex(content) == sha256
        self.puts += 1
        self.blobs[sha256] = content

    def publish_release(self, target_path: str, targets: bytes, manifest: bytes) -> object:
        self.published.append((target_path, targets, manifest))
        return None


@pytest.fixture
def bundle(tmp_path: Path) -> ReleaseBundle:
    workspace = Workspace(tmp_path / "keys")
    init_keys(workspace, tmp_path / "server", "pass", NOW)
    build = make_build_directory(tmp_path / "build")
    return create_release(
        build,
        version="1",
        workspace=workspace,
        passphrase="pass",
        waivers={},
        out_dir=tmp_path / "bundle",
        created=NOW,
    )


def test_everything_that_the_release_names_arrives(bundle: ReleaseBundle) -> None:
    """Chunks and documents by digest, shared chunks once; then the signed metadata."""
    shelf, events = Shelf(), list[PublishEvent]()
    report = publish(bundle, shelf, events.append)
    assert shelf.published == [("releases/home-intents/1.json", bundle.targets, bundle.manifest)]
    assert report.blobs_sent == len(shelf.blobs) == shelf.puts
    assert (
        report.bytes_sent
        == sum(map(len, shelf.blobs.values()))
        == events[-1].bytes_sent
        == events[-1].bytes_to_send
    )
    whole = b"".join(
        shelf.blobs[chunk.sha256]
        for entry, variant, folder in bundle.variants[:1]
        for chunk in bundle.chunk_map(variant.model_file(), folder).chunks
    )
    assert sha256_hex(whole) == bundle.variants[0][1].model_file().sha256
    two_files = sum(variant.model_file().bytes for _, variant, _ in bundle.variants)
    assert report.bytes_sent < 0.7 * two_files  # the variants differ in their header only
    for name in ("golden_pack", "evidence", "provenance"):
        assert getattr(bundle.release, name).sha256 in shelf.blobs
    assert all(entry.sha256 in shelf.blobs for entry in bundle.release.variants)


def test_a_second_time_nothing_is_sent(bundle: ReleaseBundle) -> None:
    """Only the metadata, which the control plane answers as it did before."""
    shelf = Shelf()
    first = publish(bundle, shelf)
    again = publish(bundle, shelf)
    assert (again.blobs_sent, again.bytes_sent, again.blobs_present) == (0, 0, first.blobs_sent)


def test_an_interrupted_upload_goes_on(bundle: ReleaseBundle) -> None:
    """Nothing is published half; what was sent is not sent again."""
    shelf = Shelf(breaks_after=3)
    with pytest.raises(NetworkError):
        publish(bundle, shelf)
    assert shelf.published == []
    shelf.breaks_after = None
    report = publish(bundle, shelf)
    assert report.blobs_present == 3
    assert len(shelf.published) == 1


def test_damaged_chunks_are_not_sent(bundle: ReleaseBundle) -> None:
    """A bundle that was changed after it was signed stops before the metadata."""
    path = bundle.path / "variants" / "pi5-8gb" / "model.gguf"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)
    shelf = Shelf()
    with pytest.raises(DigestError, match="damaged"):
        publish(bundle, shelf)
    assert shelf.published == []
